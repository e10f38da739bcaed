import pytest
import torch
from conftest import VOCAB

from rankgate.conversion.windows import overlap, run_hashes, token_windows
from rankgate.errors import RankgateError


def test_windows_are_the_text(tokenizer):
    text = "The quick brown fox jumps over the lazy dog. " * 4
    windows = token_windows(tokenizer, text, tokens=100, context=16)
    assert windows.shape == (6, 16)
    assert tokenizer.decode(windows.flatten()) == text[:96]


def test_every_window_begins_with_the_token_that_the_tokenizer_puts_first(tokenizer):
    class WithBos:
        bos_token_id = 2

        def __call__(self, text, add_special_tokens=True, **_):
            ids = tokenizer(text, add_special_tokens=False)
            ids["input_ids"] = [2, *ids["input_ids"]] if add_special_tokens else ids["input_ids"]
            return ids

    windows = token_windows(WithBos(), "abcdefghij", tokens=8, context=4)
    assert windows[:, 0].tolist() == [2, 2]
    assert tokenizer.decode(windows[:, 1:].flatten()) == "abcdef"


@pytest.mark.parametrize(("tokens", "context", "message"), [(8, 1, "predicts nothing"), (8, 9, "one context of 9")])
def test_impossible_windows_are_refused(tokenizer, tokens, context, message):
    with pytest.raises(RankgateError, match=message):
        token_windows(tokenizer, "some text", tokens, context)


def test_short_text_says_how_long_it_is(tokenizer):
    with pytest.raises(RankgateError, match="has 5 tokens, 8 were asked for"):
        token_windows(tokenizer, "short", 8, 8)


def test_overlap_finds_every_shared_run_of_63_tokens_and_none_of_31():
    generator = torch.Generator().manual_seed(0)
    known = torch.randint(0, VOCAB, (3, 512), generator=generator)
    hashes = run_hashes(known)
    fresh = torch.randint(0, VOCAB, (2, 512), generator=generator)
    assert not overlap(fresh, hashes)
    assert overlap(known[1:2], hashes)
    for start in range(0, 512 - 63, 7):
        mixed = fresh.clone()
        mixed[1, 100:163] = known[2, start : start + 63]
        assert overlap(mixed, hashes)
    mixed = fresh.clone()
    mixed[1, 100:131] = known[2, :31]
    assert not overlap(mixed, hashes)


def test_overlap_is_found_in_windows_shorter_than_a_run():
    known = torch.randint(0, VOCAB, (40, 16), generator=torch.Generator().manual_seed(0))
    assert overlap(known[5:15], run_hashes(known))
    assert not overlap(known.flip(1), run_hashes(known))


def test_monotonous_runs_prove_nothing():
    rule = torch.full((1, 128), 7)
    assert not overlap(rule, run_hashes(rule))
    assert run_hashes(torch.arange(20)[None]).numel() == 0


def test_of_a_large_text_no_more_is_read_than_it_takes(tokenizer):
    seen = []

    class Counting:
        bos_token_id = None

        def __call__(self, text, **options):
            seen.append(len(text))
            return tokenizer(text, **options)

    text = "".join(f"line number {i}\n" for i in range(10_000))
    windows = token_windows(Counting(), text, 64, 32)
    assert torch.equal(windows, token_windows(tokenizer, text[:4000], 64, 32)) and max(seen) < 4000
