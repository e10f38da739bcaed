// What every program here begins with. HALF: whether x is float16 and not bfloat16; OVERLAP: whether a kernel may begin
// before the one before it is through, see overlap.py.

typedef unsigned int u32;

#if HALF
#define KIND "f16x2"
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
#else
#define KIND "bf16x2"
#define MMA BFLOAT16
#endif
#define BFLOAT16 "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
#define MULTIPLY(INSTRUCTION, c, a, first, second)                                                           \
    asm volatile(INSTRUCTION " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                        \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                            \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(first), "r"(second))

#define ROUNDED(KIND, low, high)                                                  \
    u32 d;                                                                        \
    asm("cvt.rn." KIND ".f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));       \
    return d

__device__ __forceinline__ u32 both(float low, float high) { ROUNDED(KIND, low, high); }  // in the dtype of x

__device__ __forceinline__ u32 both_bfloat16(float low, float high) { ROUNDED("bf16x2", low, high); }

__device__ __forceinline__ float of_bfloat16(unsigned short bits) { return __uint_as_float((u32)bits << 16); }

__device__ __forceinline__ void wait_for_the_one_before() {
#if OVERLAP
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_the_next_begin() {
#if OVERLAP
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ __forceinline__ float signed_byte(u32 word, int i) {  // without a conversion: those are slow
    return __uint_as_float(__byte_perm(word ^ 0x80808080, 0x4b000000, 0x7440 + i)) - 8388736.f;
}

__device__ __forceinline__ u32 four(const signed char* row, int j, int n) {  // bytes from j on, zero behind the end
    if (j + 4 <= n && ((unsigned long long)(row + j) & 3) == 0) return *(const u32*)(row + j);
    u32 bytes = 0;
    for (int i = 0; i < 4; i++)
        if (j + i < n) bytes |= (u32)(unsigned char)row[j + i] << 8 * i;
    return bytes;
}
