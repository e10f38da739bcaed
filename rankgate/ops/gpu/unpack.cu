// W = Q + A diag(s) B + E, rounded to 16 bits once, for a strip of 128 rows and one block of 64 columns; see unpack.py,
// which defines
//
//     BITS, ZERO, GROUPS, HALF   as in fragments.cu
//     STEPS                      sixteens of components of A and B, 0 without them
//     REFINED                    whether there is an E
//
// A thread has eight rows, which are a word of the plane: that lies there by column and is turned in shared memory; and
// four columns in either half of the block. Which rows and columns a tile of mma.m16n8k16 consists of does not matter:
// with rows p and p + 32 of a word, and the columns of a thread side by side in four tiles, A diag(s) B is computed
// where it is needed. A nibble at bit 16 under the exponent of 1 is 1 + q / 128.

#define WORDS 16  // of the plane, in a column of the strip
#define STRIDE (WORDS + 2)
#define ROWS 8
#define COLUMNS 8
#define PER (BITS / 4)  // words of codes of a row

__device__ __forceinline__ float nibble(u32 word, int place) {  // 1 + q / 128
    const int shift = 4 * place - 16;
    return __uint_as_float((shift > 0 ? word >> shift : word << -shift) & 0xf0000 | 0x3f800000);
}

__device__ __forceinline__ u32 scaled(const u32* words, const float* c, int i) {  // the i-th byte of either word
    return both_bfloat16(signed_byte(words[0], i) * c[0], signed_byte(words[1], i) * c[1]);
}

extern "C" __global__ void __launch_bounds__(128) unpack(
    unsigned short* __restrict__ W, const u32* __restrict__ codes, const unsigned short* __restrict__ scale,
    const signed char* __restrict__ zero, const signed char* __restrict__ A, const signed char* __restrict__ B,
    const float* __restrict__ component, const uint4* __restrict__ plane,
    const unsigned short* __restrict__ row_factor, const unsigned short* __restrict__ column, int start, int stop, int n,
    int blocks, int rank) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int strip = start / 128 + blockIdx.y, block = blockIdx.x, word = warp / 2 * 8 + g, quad = warp % 2 * 4 + t;
    const int first = strip * 128 + word / 8 * 64 + word % 8 * 4, at = block * 64 + 4 * quad;
    u32 q[ROWS][PER];
    float s[ROWS][GROUPS], z[ROWS][GROUPS], of_row[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        const int row = min(first + i % 4 + 32 * (i / 4), stop - 1);
        const long place = (long)row * blocks + block;
#pragma unroll
        for (int k = 0; k < PER; k++) q[i][k] = codes[place * 2 * BITS + quad + 8 * k];
#pragma unroll
        for (int k = 0; k < GROUPS; k++) {
            s[i][k] = of_bfloat16(scale[place * GROUPS + k]);
            z[i][k] = ZERO ? zero[place * GROUPS + k] : BITS == 4 ? 8.f : 0.f;
        }
#if REFINED
        of_row[i] = of_bfloat16(row_factor[row]);
#endif
    }
#if STEPS
    const int far = block * 64 + (warp % 2 * 4 + g / 2) * 4 + g % 2 * 32;  // columns of a lane in the tiles
    u32 a[STEPS][ROWS], b[STEPS][4];
    float c[STEPS][4];
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        const int k = 16 * step + 4 * t;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            b[step][i] = k + i < rank ? four(B + (long)(k + i) * n, far, n) : 0;
            c[step][i] = k + i < rank ? component[k + i] : 0.f;
        }
#pragma unroll
        for (int i = 0; i < ROWS; i++)
            a[step][i] = four(A + (long)min(first + i % 4 + 32 * (i / 4), stop - 1) * rank, k, rank);
    }
#endif
#if REFINED
    __shared__ __align__(16) u32 turned[64 * STRIDE];
    const int pieces = strip * 128 + 64 < stop ? 4 : 2;  // of 16 bytes, in a column
    for (int i = threadIdx.x; i < 64 * pieces && block * 64 + i / pieces < n; i += 128) {
        const uint4 v = plane[(long)strip * 4 * n + (long)block * 64 * pieces + i];
        uint2* place = (uint2*)(turned + i / pieces * STRIDE + i % pieces * 4);
        place[0] = make_uint2(v.x, v.y), place[1] = make_uint2(v.z, v.w);
    }
    float factor[COLUMNS];
#pragma unroll
    for (int j = 0; j < COLUMNS; j++) {
        const int here = at + j % 4 + 32 * (j / 4);
        factor[j] = here < n ? 128 * of_bfloat16(column[here]) : 0.f;
    }
    __syncthreads();
    u32 e[COLUMNS];
#pragma unroll
    for (int j = 0; j < COLUMNS; j++) e[j] = turned[(4 * quad + j % 4 + 32 * (j / 4)) * STRIDE + word];
#endif
    wait_for_the_one_before();
#pragma unroll
    for (int p = 0; p < ROWS / 2; p++) {
#if STEPS
        float low[4][4] = {};
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            u32 rows[4];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const u32 v = a[step][p + 4 * h];
                rows[h] = both_bfloat16(signed_byte(v, 0), signed_byte(v, 1));
                rows[2 + h] = both_bfloat16(signed_byte(v, 2), signed_byte(v, 3));
            }
#pragma unroll
            for (int i = 0; i < 4; i++)
                MULTIPLY(BFLOAT16, low[i], rows, scaled(b[step], c[step], i), scaled(b[step] + 2, c[step] + 2, i));
        }
#endif
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int i = p + 4 * h, row = first + p + 32 * h;
            float value[COLUMNS];
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) {
                const float scale = s[i][j / 4 * (GROUPS - 1)], zero = z[i][j / 4 * (GROUPS - 1)];
#if BITS == 4
                value[j] = nibble(q[i][0], j % 4 * 2 + j / 4) * (128 * scale) - (128 + zero) * scale;
#else
                value[j] = (signed_byte(q[i][j / 4], j % 4) - zero) * scale;
#endif
#if STEPS
                value[j] += low[j % 4][2 * h + j / 4];
#endif
#if REFINED
                value[j] += of_row[i] * (factor[j] * nibble(e[j], p * 2 + h) - 1.0625f * factor[j]);
#endif
            }
            unsigned short* out = W + (long)(row - start) * n + at;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float* v = value + 4 * half;
                const uint2 packed = make_uint2(both(v[0], v[1]), both(v[2], v[3]));
                if (row >= stop || at + 32 * half >= n) continue;
                if (n % 4 == 0) {
                    *(uint2*)(out + 32 * half) = packed;
                } else {
                    for (int j = 0; j < 4; j++)
                        if (at + 32 * half + j < n) out[32 * half + j] = (j < 2 ? packed.x : packed.y) >> 16 * (j % 2);
                }
            }
        }
    }
}
