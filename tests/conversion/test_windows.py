import pytest
import torch
from conftest import VOCAB

from rankgate.conversion.windows import overlap, run_hashes, text_prefix, token_windows
from rankgate.errors import RankgateError


def test_windows_are_the_text(tokenizer):
    text = "The quick brown fox jumps over the lazy dog. " * 4
    windows = token_windows(tokenizer, text, tokens=100, context=16)
    assert windows.shape == (6, 16)
    assert tokenizer.decode(windows.flatten()) == text[:96]


def test_every_window_begins_with_what_the_tokenizer_puts_first(tokenizer, prefixing):
    assert text_prefix(tokenizer) == [] and text_prefix(prefixing) == [tokenizer.bos_token_id]
    windows = token_windows(prefixing, "abcdefghij", tokens=8, context=4)
    assert windows[:, 0].tolist() == [tokenizer.bos_token_id] * 2
    assert tokenizer.decode(windows[:, 1:].flatten()) == "abcdef"


def test_a_prefix_may_be_several_tokens(tokenizer):
    class TwoFirst:
        def __call__(self, text, add_special_tokens=True, **options):
            ids = tokenizer(text, **options)
            ids["input_ids"] = [7, 3] * add_special_tokens + ids["input_ids"]
            return ids

    windows = token_windows(TwoFirst(), "abcdefghij", tokens=12, context=4)
    assert windows[:, :2].tolist() == [[7, 3]] * 3
    assert tokenizer.decode(windows[:, 2:].flatten()) == "abcdef"
    with pytest.raises(RankgateError, match="context of 2 tokens predicts nothing; use at least 3"):
        token_windows(TwoFirst(), "abcdefghij", tokens=12, context=2)


def test_characters_that_spell_a_special_token_are_text(tokenizer):
    text = "the <unk> of </s> <unk>"
    windows = token_windows(tokenizer, text, len(text), len(text))
    assert windows.min() > tokenizer.eos_token_id and tokenizer.decode(windows[0]) == text


@pytest.mark.parametrize("context", [16, 24, 40, 512])
def test_overlap_is_of_the_text_where_windows_begin_with_a_prefix(prefixing, context):
    text = "".join(f"line number {i} of many\n" for i in range(400))
    known = run_hashes(token_windows(prefixing, text[:4000], 2048, context))
    assert overlap(token_windows(prefixing, text[700:1800], 1000, 20), known)
    assert overlap(token_windows(prefixing, text[700:1800], 1000, 1000), known)
    assert not overlap(token_windows(prefixing, text[5000:], 1000, 20), known)


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
        def __call__(self, text, **options):
            seen.append(len(text))
            return tokenizer(text, **options)

    text = "".join(f"line number {i}\n" for i in range(10_000))
    windows = token_windows(Counting(), text, 64, 32)
    assert torch.equal(windows, token_windows(tokenizer, text[:4000], 64, 32)) and max(seen) < 4000
