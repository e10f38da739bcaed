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

__device__ __forceinline__ u32 both(float low, float high) {  // in the dtype of x
    u32 d;
    asm("cvt.rn." KIND ".f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}

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

