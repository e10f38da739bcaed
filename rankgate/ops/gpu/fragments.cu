// out = Q x + extra for a few tokens, on tensor cores; see fragments.py, which defines
//
//     TILES, WARPS  a block takes 16 TILES rows, its warps turn by turn 64 bytes of each of them
//     COLUMNS       and 8 COLUMNS tokens
//     BITS, ZERO    of a code; whether groups have zeros of their own
//     GROUPS        in a block of 64 inputs: 1 or 2
//     HALF          whether x and out are float16 and not bfloat16
//     OVERLAP       whether the kernel may begin before the one before it is through
//
// A thread loads 16 bytes of codes of the rows that are its own in a fragment of mma.m16n8k16. Which input of x stands
// where in a fragment does not matter as long as it is the same in both factors: so x is arranged by the order in which
// codes lie in a word, and a code never leaves the thread that loaded it.

#if HALF
#define ONE 0x3c003c00u
#define MAGIC 0x64006400u  // a small integer in its last bits: that and 1024
#define OFFSET 1024.f
#else
#define ONE 0x3f803f80u
#define MAGIC 0x43004300u  // the same with 128
#define OFFSET 128.f
#endif
#define BYTES 64              // of a row that a warp takes together
#define BLOCKS (8 / BITS)     // of 64 inputs in them
#define SCALES (BITS == 4 ? GROUPS : 1)  // of the codes of a thread: nibbles, low and high, are of both groups
#define STEPS (32 / BITS)     // products of 16 inputs
#define MINUS_ZERO 0x80008000u
#define RESULTS ((COLUMNS * 8 * TILES * 16 + 32 * WARPS - 1) / (32 * WARPS))  // of a thread
#define TOGETHER 4            // parts of `extra`

__device__ __forceinline__ u32 fma2(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn." KIND " %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

__device__ __forceinline__ uint4 streamed(const unsigned char* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

struct Row {  // 16 bytes of one
    u32 word[4];
    float scale[SCALES], zero[SCALES];
};

// (q - z) s of four codes of a word, as the two pairs of a fragment: at 4 bits of its low nibbles or its high ones
__device__ __forceinline__ void weights(const Row& row, int step, u32& first, u32& second) {
#if BITS == 4
    const u32 word = row.word[step / 2] >> 4 * (step % 2);
    const float z = -OFFSET - row.zero[step % SCALES], s = row.scale[step % SCALES];
    const u32 zero = both(z, z), scale = both(s, s);
    asm("lop3.b32 %0, %1, 0x000f000f, %2, 0xea;" : "=r"(first) : "r"(word), "r"(MAGIC));
    asm("lop3.b32 %0, %1, 0x000f000f, %2, 0xea;" : "=r"(second) : "r"(word >> 8), "r"(MAGIC));
    first = fma2(fma2(first, ONE, zero), scale, MINUS_ZERO);
    second = fma2(fma2(second, ONE, zero), scale, MINUS_ZERO);
#else
    const u32 word = row.word[step] ^ 0x80808080u;
    float value[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {  // under the exponent of 2^23
        const float code = __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7650 + i)) - 8388736.f;
        value[i] = (code - row.zero[0]) * row.scale[0];
    }
    first = both(value[0], value[1]);
    second = both(value[2], value[3]);
#endif
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) fragments(
    const unsigned short* __restrict__ x, unsigned short* __restrict__ out, const unsigned char* __restrict__ codes,
    const unsigned short* __restrict__ scale, const signed char* __restrict__ zero, const float* __restrict__ extra,
    int tokens, int m, int blocks, int parts) {
    __shared__ float sums[WARPS][COLUMNS * 8][TILES * 16 + 1];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
    const int first_token = blockIdx.x * COLUMNS * 8, first_row = blockIdx.y * TILES * 16;
    const int chunks = (blocks + BLOCKS - 1) / BLOCKS;
    const long n = (long)blocks * 64;
    float total[TILES][COLUMNS][4] = {};
    Row next[2 * TILES];

    auto load = [&](int chunk) {
        const int block = chunk * BLOCKS + c * BLOCKS / 4;
        const bool there = block < blocks;
#pragma unroll
        for (int i = 0; i < 2 * TILES; i++) {
            const long at = (long)min(first_row + 8 * i + r, m - 1) * blocks + (there ? block : 0);
            const uint4 v = streamed(codes + at * 8 * BITS + 16 * (c % (BITS / 2)));
            next[i].word[0] = v.x, next[i].word[1] = v.y, next[i].word[2] = v.z, next[i].word[3] = v.w;
#pragma unroll
            for (int k = 0; k < SCALES; k++) {
                const long group = at * GROUPS + (BITS == 4 ? k : c / 2 * (GROUPS - 1));
                next[i].scale[k] = there ? of_bfloat16(scale[group]) : 0.f;
                next[i].zero[k] = ZERO ? zero[group] : BITS == 4 ? 8.f : 0.f;
            }
        }
    };

    load(warp);
    if (!parts) wait_for_the_one_before();  // who computed `extra` has waited for x
    let_the_next_begin();
    for (int chunk = warp; chunk < chunks; chunk += WARPS) {
        Row row[2 * TILES];
#pragma unroll
        for (int i = 0; i < 2 * TILES; i++) row[i] = next[i];
        load(chunk + WARPS);
        const int block = chunk * BLOCKS + c * BLOCKS / 4;
        u32 b[COLUMNS][2 * STEPS];
#pragma unroll
        for (int t = 0; t < COLUMNS; t++) {
            const long token = min(first_token + 8 * t + r, tokens - 1);
            const uint4* from = (const uint4*)(x + token * n + (block < blocks ? block : 0) * 64 + 16 * (c % (BITS / 2)));
#pragma unroll
            for (int q = 0; q < STEPS / 2; q++) {
                // at 4 bits the 16 low nibbles are of inputs 0 ... 15, the high ones of 32 ... 47, bytes 0 and 2 a pair
                const uint4 v = block < blocks ? from[BITS == 4 ? q / 2 * 4 + q % 2 : q] : make_uint4(0, 0, 0, 0);
#if BITS == 4
                u32* to = &b[t][8 * (q % 2) + 2 * (q / 2)];  // of two words, for each of which low and high alternate
                to[0] = __byte_perm(v.x, v.y, 0x5410), to[1] = __byte_perm(v.x, v.y, 0x7632);
                to[4] = __byte_perm(v.z, v.w, 0x5410), to[5] = __byte_perm(v.z, v.w, 0x7632);
#else
                b[t][4 * q] = v.x, b[t][4 * q + 1] = v.y, b[t][4 * q + 2] = v.z, b[t][4 * q + 3] = v.w;
#endif
            }
        }
#pragma unroll
        for (int i = 0; i < TILES; i++) {
#pragma unroll
            for (int step = 0; step < STEPS; step++) {
                u32 a[4];
                weights(row[2 * i], step, a[0], a[2]);
                weights(row[2 * i + 1], step, a[1], a[3]);
#pragma unroll
                for (int t = 0; t < COLUMNS; t++) MULTIPLY(MMA, total[i][t], a, b[t][2 * step], b[t][2 * step + 1]);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int t = 0; t < COLUMNS; t++)
#pragma unroll
            for (int j = 0; j < 4; j++) sums[warp][8 * t + 2 * c + j % 2][16 * i + r + 8 * (j / 2)] = total[i][t][j];
    __syncthreads();
    float y[RESULTS] = {};
    long place[RESULTS];  // of a result in a part and in out, or -1
#pragma unroll
    for (int i = 0; i < RESULTS; i++) {
        const int at = threadIdx.x + 32 * WARPS * i, t = at / (TILES * 16), own = at % (TILES * 16);
        const bool there = t < COLUMNS * 8 && first_token + t < tokens && first_row + own < m;
        place[i] = there ? (long)(first_token + t) * m + first_row + own : -1;
#pragma unroll
        for (int w = 0; w < WARPS; w++) y[i] += there ? sums[w][t][own] : 0.f;
    }
    if (parts) wait_for_the_one_before();
    for (int part = 0; part < parts; part += TOGETHER) {  // their loads are under way together
        float e[TOGETHER][RESULTS];
#pragma unroll
        for (int k = 0; k < TOGETHER; k++)
#pragma unroll
            for (int i = 0; i < RESULTS; i++)
                e[k][i] = part + k < parts && place[i] >= 0 ? extra[(long)(part + k) * tokens * m + place[i]] : 0.f;
#pragma unroll
        for (int k = 0; k < TOGETHER; k++)
#pragma unroll
            for (int i = 0; i < RESULTS; i++) y[i] += e[k][i];
    }
#pragma unroll
    for (int i = 0; i < RESULTS; i++)
        if (place[i] >= 0) out[place[i]] = (unsigned short)both(y[i], 0.f);
}
