// What low rank and refinement add for a few tokens, on tensor cores; see united.py, which defines
//
//     COLUMNS   a block takes 8 COLUMNS tokens
//     REFINED   whether there is an E
//     HALF      whether x is float16 and not bfloat16
//     OVERLAP   whether a kernel may begin before the one before it is through
//
//     prepare   lists and values of LISTING channels; low[chunk, token, component] = s B x over CHUNK inputs
//     united    extra[part, token, row] = E x over some of the lists, and in the first part A z, for 128 rows
//
// The plane is stored by channel, as a fragment of mma.m16n8k16 is read by row: so a thread loads four bytes of each of
// four channels, which are eight rows, and pairs the bytes of two channels. Which rows form a tile does not matter as
// long as results are put where they belong: tile i has byte i of every word, low nibbles above high ones.

#define WARPS (COLUMNS == 4 ? 4 : 8)  // of `united`: half of them take half of a strip
#define THREADS (32 * WARPS)
#define LISTERS 256             // threads of `prepare`
#define CHUNK 512
#define TOKENS (8 * COLUMNS)
#define DEPTH 4                 // products for which a warp has loads under way
#define STRIP 128
#define HALF_STRIP 64
#define TILES 4
#define STEP 16                 // inputs of a product
#define LISTING (2 * LISTERS)   // channels that are listed together
#define ROOM (LISTING + STEP)   // and stored: whole products
#define RANKS 16                // components of z together
#define RESULTS (TOKENS * STRIP / THREADS)  // of a thread: of one row

__device__ __forceinline__ u32 less_eight(u32 codes) {  // two of 0 ... 15 in the last bits of 16: q - 8 as bfloat16
    u32 d;
    asm("lop3.b32 %0, %1, 0x000f000f, 0x43004300, 0xea;" : "=r"(d) : "r"(codes));
    asm("fma.rn.bf16x2 %0, %0, %1, %2;" : "+r"(d) : "r"(0x3f803f80u), "r"(0xc308c308u));
    return d;
}

__device__ __forceinline__ unsigned short bfloat16(float value) {
    unsigned short d;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(d) : "f"(value));
    return d;
}

__device__ __forceinline__ void two(u32 packed, float& first, float& second) {  // of x
#if HALF
    asm("{.reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
        : "=f"(first), "=f"(second) : "r"(packed));
#else
    first = __uint_as_float(packed << 16), second = __uint_as_float(packed & 0xffff0000u);
#endif
}

__device__ __forceinline__ u32 integers(u32 bytes, int first) {  // two signed bytes in the dtype of x
    return both((float)(signed char)(bytes >> 8 * first), (float)(signed char)(bytes >> 8 * first + 8));
}

__device__ __forceinline__ void begin() {
    wait_for_the_one_before();
    let_the_next_begin();
}

// Of one tile of tokens, channels that any of them opens, to whole products, and for each product its 16 x_j column_j of
// every token, 0 of those that do not open it.
__device__ __forceinline__ void list(
    const unsigned short* __restrict__ x, const unsigned short* __restrict__ column,
    const unsigned short* __restrict__ threshold, int* __restrict__ channels, unsigned short* __restrict__ values,
    int* __restrict__ counts, int listing, int lists, int tokens, int n, int width) {
    __shared__ int found[LISTERS / 32];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, tile = blockIdx.y;
    const int j = listing * LISTING + 2 * threadIdx.x;
    const bool there[2] = {j < n, j + 1 < n};
    float limit[2], scale[2];
#pragma unroll
    for (int k = 0; k < 2; k++) {
        limit[k] = there[k] ? of_bfloat16(threshold[j + k]) : 0;
        scale[k] = there[k] ? of_bfloat16(column[j + k]) : 0;
    }
    begin();
    u32 packed[TOKENS];
#pragma unroll
    for (int t = 0; t < TOKENS; t++)
        packed[t] = there[0] ? *(const u32*)(x + (long)min(tile * TOKENS + t, tokens - 1) * width + j) : 0;
    bool open[2] = {false, false};
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        float v[2];
        two(packed[t], v[0], v[1]);
        open[0] |= there[0] && fabsf(v[0]) > limit[0], open[1] |= there[1] && fabsf(v[1]) > limit[1];
    }
    const u32 first = __ballot_sync(~0u, open[0]), second = __ballot_sync(~0u, open[1]), before = (1u << lane) - 1;
    if (lane == 0) found[warp] = __popc(first) + __popc(second);
    __syncthreads();
    int place = 0, listed = 0;
#pragma unroll
    for (int w = 0; w < LISTERS / 32; w++) place += w < warp ? found[w] : 0, listed += found[w];
    const int places[2] = {place + __popc(first & before), place + __popc(first) + __popc(second & before)};
    channels += (long)(tile * lists + listing) * ROOM, values += (long)(tile * lists + listing) * ROOM * TOKENS;
#pragma unroll
    for (int k = 0; k < 2; k++) {
        if (!open[k]) continue;
        channels[places[k]] = j + k;
        unsigned short* to = values + places[k] / STEP * STEP * TOKENS + places[k] % STEP;
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            float v[2];
            two(packed[t], v[0], v[1]);
            to[STEP * t] = fabsf(v[k]) > limit[k] ? bfloat16(v[k] * scale[k]) : 0;
        }
    }
    if (threadIdx.x < STEP) {
        const int at = listed + threadIdx.x;
        channels[at] = 0;
        for (int t = 0; t < TOKENS; t++) values[at / STEP * STEP * TOKENS + at % STEP + STEP * t] = 0;
    }
    if (threadIdx.x == 0) counts[tile * lists + listing] = listed;
}

// z over CHUNK inputs, 64 for each warp: a thread takes 16 of them, four for each product.
__device__ __forceinline__ void project(
    const unsigned short* __restrict__ x, const signed char* __restrict__ B, const float* __restrict__ factor,
    float* __restrict__ low, int chunk, int tokens, int n, int width, int rank) {
    __shared__ float sums[LISTERS / 32][RANKS][TOKENS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
    const int j = chunk * CHUNK + 64 * warp + 16 * c, first_token = blockIdx.y * TOKENS;
    for (int k = 0; k < rank; k += RANKS) {
        u32 weights[2][4];
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int q = 0; q < 4; q++) weights[i][q] = four(B + (long)min(k + 8 * i + r, rank - 1) * n, j + 4 * q, n);
        if (k == 0) begin();
        float z[COLUMNS][4] = {};
        u32 v[COLUMNS][8];
#pragma unroll
        for (int t = 0; t < COLUMNS; t++) {
            const uint4* from = (const uint4*)(x + (long)min(first_token + 8 * t + r, tokens - 1) * width + j);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const uint4 q = j < width ? from[i] : make_uint4(0, 0, 0, 0);
                v[t][4 * i] = q.x, v[t][4 * i + 1] = q.y, v[t][4 * i + 2] = q.z, v[t][4 * i + 3] = q.w;
            }
        }
#pragma unroll
        for (int q = 0; q < 4; q++) {
            const u32 upper = weights[0][q], lower = weights[1][q];
            const u32 a[4] = {integers(upper, 0), integers(lower, 0), integers(upper, 2), integers(lower, 2)};
#pragma unroll
            for (int t = 0; t < COLUMNS; t++) MULTIPLY(MMA, z[t], a, v[t][2 * q], v[t][2 * q + 1]);
        }
        __syncthreads();
#pragma unroll
        for (int t = 0; t < COLUMNS; t++)
#pragma unroll
            for (int i = 0; i < 4; i++) sums[warp][r + 8 * (i / 2)][8 * t + 2 * c + i % 2] = z[t][i];
        __syncthreads();
        for (int i = threadIdx.x; i < TOKENS * RANKS; i += LISTERS) {
            const int t = i / RANKS, of = k + i % RANKS;
            float sum = 0;
#pragma unroll
            for (int w = 0; w < LISTERS / 32; w++) sum += sums[w][i % RANKS][t];
            if (of < rank && first_token + t < tokens)
                low[((long)chunk * tokens + first_token + t) * rank + of] = sum * factor[of];
        }
    }
}

extern "C" __global__ void __launch_bounds__(LISTERS) prepare(
    const unsigned short* __restrict__ x, const signed char* __restrict__ B, const float* __restrict__ factor,
    const unsigned short* __restrict__ column, const unsigned short* __restrict__ threshold, int* __restrict__ channels,
    unsigned short* __restrict__ values, int* __restrict__ counts, float* __restrict__ low, int lists, int tokens, int n,
    int width, int rank) {
    const int block = blockIdx.x;
#if REFINED
    if (block < lists) {
        list(x, column, threshold, channels, values, counts, block, lists, tokens, n, width);
        return;
    }
#endif
    project(x, B, factor, low, block - lists, tokens, n, width, rank);
}

extern "C" __global__ void __launch_bounds__(THREADS) united(
    const signed char* __restrict__ A, const unsigned char* __restrict__ plane,
    const unsigned short* __restrict__ row_factor, const int* __restrict__ channels,
    const unsigned short* __restrict__ values, const int* __restrict__ counts, const float* __restrict__ low,
    float* __restrict__ extra, int lists, int together, int chunks, int tokens, int m, int n, int rank) {
    const int strip = blockIdx.x, part = blockIdx.y, tile = blockIdx.z, first_token = tile * TOKENS;
    const int own = threadIdx.x % STRIP, row = strip * STRIP + min(own, m - 1 - strip * STRIP);
    float y[RESULTS] = {};
    let_the_next_begin();
    wait_for_the_one_before();

#if REFINED
    __shared__ float sums[WARPS][TOKENS][HALF_STRIP + 1];
    __shared__ __align__(16) int listed[ROOM];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = lane / 4, c = lane % 4, half = warp % 2;
    const int stride = strip * STRIP + HALF_STRIP < (m + HALF_STRIP - 1) / HALF_STRIP * HALF_STRIP ? 64 : 32;
    const unsigned char* codes = plane + (long)strip * 64 * n + 32 * half + 4 * r;
    float total[TILES][COLUMNS][4] = {};
    for (int list = part * together; list < min((part + 1) * together, lists); list++) {
        const long from = (long)(tile * lists + list) * ROOM;
        const int count = counts[tile * lists + list];
        __syncthreads();
        for (int i = 4 * threadIdx.x; i < count + STEP; i += 4 * THREADS)
            *(int4*)(listed + i) = *(const int4*)(channels + from + i);
        __syncthreads();
        const unsigned short* v = values + from * TOKENS + STEP * r + 4 * c;
        u32 word[DEPTH][4];
        uint2 x[DEPTH][COLUMNS];
        auto load = [&](int slot, int at) {
            const int4 k = *(const int4*)(listed + at + 4 * c);
            word[slot][0] = *(const u32*)(codes + (long)k.x * stride);
            word[slot][1] = *(const u32*)(codes + (long)k.y * stride);
            word[slot][2] = *(const u32*)(codes + (long)k.z * stride);
            word[slot][3] = *(const u32*)(codes + (long)k.w * stride);
#pragma unroll
            for (int t = 0; t < COLUMNS; t++) x[slot][t] = *(const uint2*)(v + at * TOKENS + STEP * 8 * t);
        };
        const int hop = WARPS / 2 * STEP;
        int at = 32 * half < stride ? warp / 2 * STEP : count;  // a strip of at most 64 rows has no second half
#pragma unroll
        for (int slot = 0; slot < DEPTH; slot++)
            if (at + slot * hop < count) load(slot, at + slot * hop);
        while (at < count) {
#pragma unroll
            for (int slot = 0; slot < DEPTH; slot++, at += hop) {
                if (at >= count) continue;
#pragma unroll
                for (int i = 0; i < TILES; i++) {
                    const u32 first = __byte_perm(word[slot][0], word[slot][1], i | (4 + i) << 8);
                    const u32 second = __byte_perm(word[slot][2], word[slot][3], i | (4 + i) << 8);
                    const u32 a[4] = {
                        less_eight(first), less_eight(first >> 4), less_eight(second), less_eight(second >> 4)};
#pragma unroll
                    for (int t = 0; t < COLUMNS; t++) MULTIPLY(BFLOAT16, total[i][t], a, x[slot][t].x, x[slot][t].y);
                }
                if (at + DEPTH * hop < count) load(slot, at + DEPTH * hop);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int t = 0; t < COLUMNS; t++)
#pragma unroll
            for (int k = 0; k < 4; k++) sums[warp][8 * t + 2 * c + k % 2][4 * r + i + 32 * (k / 2)] = total[i][t][k];
    __syncthreads();
    const float of_row = of_bfloat16(row_factor[row]);
#pragma unroll
    for (int i = 0; i < RESULTS; i++) {
        const int t = threadIdx.x / STRIP + THREADS / STRIP * i;
#pragma unroll
        for (int w = 0; w < WARPS; w += 2) y[i] += sums[w + own / HALF_STRIP][t][own % HALF_STRIP];
        y[i] *= of_row;
    }
#endif

    __shared__ __align__(16) float z[TOKENS][RANKS];
    for (int k = 0; k < (part == 0 ? rank : 0); k += RANKS) {
        float a[RANKS];
#pragma unroll
        for (int i = 0; i < RANKS; i++) a[i] = A[(long)row * rank + min(k + i, rank - 1)];
        __syncthreads();
        for (int i = threadIdx.x; i < TOKENS * RANKS; i += THREADS) {
            const int t = first_token + i / RANKS, of = k + i % RANKS;
            const float* from = low + (long)min(t, tokens - 1) * rank + min(of, rank - 1);
            float sum = 0;
#pragma unroll 8
            for (int chunk = 0; chunk < chunks; chunk++) sum += from[(long)chunk * tokens * rank];
            z[i / RANKS][i % RANKS] = of < rank ? sum : 0;
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < RESULTS; i++)
#pragma unroll
            for (int q = 0; q < RANKS; q++) y[i] += a[q] * z[threadIdx.x / STRIP + THREADS / STRIP * i][q];
    }
#pragma unroll
    for (int i = 0; i < RESULTS; i++) {
        const int t = first_token + threadIdx.x / STRIP + THREADS / STRIP * i;
        if (t < tokens && strip * STRIP + own < m) extra[((long)part * tokens + t) * m + row] = y[i];
    }
}
