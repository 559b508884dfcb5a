// What a warp can do that C++ has no word for, as inline PTX: no header of CUDA is needed.
// tests/kernels/emulator replaces this file to run the kernels on a CPU.

typedef unsigned char uint8_t;
typedef signed char int8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;

#define DEVICE __device__ __forceinline__
#define SHARED_MEMORY extern __shared__ __align__(1024) uint8_t shared_memory[];

DEVICE uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
DEVICE void sync_block() { __syncthreads(); }
// Waits for `threads` threads of whole warps, which name the same barrier: 1 to 15, of which nobody else makes use.
DEVICE void sync_some(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" : : "r"(barrier), "r"(threads) : "memory");
}

// A block's copy of `BYTES` bytes from global to shared memory, both at multiples of 16, on its way while the block goes
// on. All `THREADS` threads begin it, which waits for them all; `arrivals` are 8 bytes for a barrier in shared memory.
template <int BYTES, int THREADS>
DEVICE void copy_to_shared(uint32_t to, const uint8_t* from, uint32_t arrivals, int thread) {
#if __CUDA_ARCH__ >= 900
  constexpr int PIECE = 32768;
  static_assert(BYTES % PIECE == 0, "pieces are of one size");
  if (thread == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" : : "r"(arrivals) : "memory");
    asm volatile("fence.proxy.async.shared::cta;" : : : "memory");  // copies must see what was begun
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" : : "r"(arrivals), "r"(BYTES) : "memory");
#pragma unroll 1
    for (int i = 0; i < BYTES; i += PIECE)
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                   : : "r"(to + i), "l"(from + i), "r"(PIECE), "r"(arrivals) : "memory");
  }
  __syncthreads();
#else
  if (thread == 0)
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" : : "r"(arrivals), "r"(THREADS) : "memory");
#pragma unroll 4
  for (int i = 16 * thread; i < BYTES; i += 16 * THREADS)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" : : "r"(to + i), "l"(from + i) : "memory");
  __syncthreads();
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" : : "r"(arrivals) : "memory");
#endif
}
// Waits until it is there; later it is a look. Every thread does before it leaves.
DEVICE void wait_for_copy(uint32_t arrivals) {
  uint32_t arrived;
  do {
#if __CUDA_ARCH__ >= 900
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0; selp.u32 %0, 1, 0, p;}"
                 : "=r"(arrived) : "r"(arrivals) : "memory");
#else
    asm volatile("{.reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], 0; selp.u32 %0, 1, 0, p;}"
                 : "=r"(arrived) : "r"(arrivals) : "memory");
#endif
  } while (!arrived);
}

// 4, 2 or 1 words from memory that nobody writes any more, so that the compiler may move the read; `settled` marks such
// an address.
template <int OFFSET>
DEVICE void load_settled(uint32_t address, uint32_t (&r)[4]) {
  asm("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4+%5];"
      : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address), "n"(OFFSET));
}
template <int OFFSET>
DEVICE void load_settled(uint32_t address, uint32_t (&r)[2]) {
  asm("ld.shared.v2.u32 {%0,%1}, [%2+%3];" : "=r"(r[0]), "=r"(r[1]) : "r"(address), "n"(OFFSET));
}
template <int OFFSET>
DEVICE void load_settled(uint32_t address, uint32_t (&r)[1]) {
  asm("ld.shared.u32 %0, [%1+%2];" : "=r"(r[0]) : "r"(address), "n"(OFFSET));
}
// After a barrier: nothing that uses the result moves before it.
DEVICE uint32_t settled(uint32_t address) {
  asm volatile("" : "+r"(address) : : "memory");
  return address;
}

// c (16 x 8, float32) += a (16 x 16, float16) b (16 x 8, float16), spread over the lanes as PTX's m16n8k16 says.
DEVICE void multiply_add(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// An 8 x 8 matrix of 16 bits, of which lane l holds elements 2 (l % 4) and one more of row l / 4, turned over.
DEVICE uint32_t transpose_matrix(uint32_t x) {
  uint32_t out;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(x));
  return out;
}

// Two float16 at a time: (x, y) turned by an angle; a * b + c; a + b.
DEVICE void turn(uint32_t& x, uint32_t& y, uint32_t cosine, uint32_t sine) {
  asm("{.reg .b32 a, b, c; mul.f16x2 a, %1, %3; neg.f16x2 a, a; fma.rn.f16x2 b, %0, %2, a;\n\t"
      "mul.f16x2 c, %0, %3; fma.rn.f16x2 %1, %1, %2, c; mov.b32 %0, b;}" : "+r"(x), "+r"(y) : "r"(cosine), "r"(sine));
}
DEVICE uint32_t multiply_add_half2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t out;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
  return out;
}
DEVICE uint32_t add_half2(uint32_t a, uint32_t b) {
  uint32_t out;
  asm("add.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  return out;
}
DEVICE uint32_t pack_half2(float low, float high) {
  uint32_t out;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}
DEVICE float half_to_float(uint16_t x) {
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(x));
  return out;
}
DEVICE float bfloat_to_float(uint16_t x) { return __uint_as_float((uint32_t)x << 16); }

// base + 128 * (byte `byte` of w), in one instruction: a product of four bytes with four others, summed.
DEVICE uint32_t times_128_plus(uint32_t w, int byte, uint32_t base) {
  uint32_t out;
  asm("dp4a.u32.u32 %0, %1, %2, %3;" : "=r"(out) : "r"(w), "r"(128u << (8 * byte)), "r"(base));
  return out;
}
DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }

DEVICE float minus_infinity() { return __int_as_float(0xff800000); }
DEVICE float exp2_fast(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}
DEVICE float sin_fast(float x) {
  float out;
  asm("sin.approx.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}
DEVICE float cos_fast(float x) {
  float out;
  asm("cos.approx.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}
DEVICE float fused_multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DEVICE float round_to_even(float x) { return rintf(x); }
DEVICE float tanh_of(float x) { return tanhf(x); }
DEVICE int smaller(int a, int b) { return min(a, b); }
DEVICE float largest(float a, float b) { return fmaxf(a, b); }

DEVICE float shuffle_xor(float x, int lanes) { return __shfl_xor_sync(0xffffffffu, x, lanes); }
DEVICE uint32_t shuffle_xor(uint32_t x, int lanes) { return __shfl_xor_sync(0xffffffffu, x, lanes); }
// `x` is the same in all lanes, which the compiler cannot know: so it may be in a register that they share.
DEVICE int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }
DEVICE bool any_lane(bool x) { return __any_sync(0xffffffffu, x); }

// `BYTES` bytes, zeros above them, straight into words: a conversion would wait for the load. Keys' codes are read once,
// by neighbouring lanes: they should not push the rest out of the L1 cache.
template <int BYTES>
DEVICE void load_once(const uint8_t* p, uint32_t* r) {
  if constexpr (BYTES == 1) asm volatile("ld.global.nc.L1::no_allocate.u8 %0, [%1];" : "=r"(r[0]) : "l"(p));
  if constexpr (BYTES == 2) asm volatile("ld.global.nc.L1::no_allocate.u16 %0, [%1];" : "=r"(r[0]) : "l"(p));
  if constexpr (BYTES == 4) asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(r[0]) : "l"(p));
  if constexpr (BYTES == 8)
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "l"(p));
  if constexpr (BYTES == 16)
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "l"(p));
}
// The same, kept in the L1 cache.
template <int BYTES>
DEVICE void load_kept(const uint8_t* p, uint32_t* r) {
  if constexpr (BYTES == 1) asm volatile("ld.global.nc.u8 %0, [%1];" : "=r"(r[0]) : "l"(p));
  if constexpr (BYTES == 2) asm volatile("ld.global.nc.u16 %0, [%1];" : "=r"(r[0]) : "l"(p));
  if constexpr (BYTES == 4) asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(r[0]) : "l"(p));
  if constexpr (BYTES == 8) asm volatile("ld.global.nc.v2.u32 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "l"(p));
}

DEVICE void load_128(const void* p, uint32_t (&r)[4]) {
  asm volatile("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "l"(p));
}

DEVICE void load_64(const void* p, uint32_t (&r)[2]) {
  asm volatile("ld.global.nc.v2.u32 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "l"(p));
}
// Two neighbours at `p`, a multiple of 8 bytes.
DEVICE void store_64(float* p, float x, float y) {
  asm volatile("st.global.v2.f32 [%0], {%1, %2};" : : "l"(p), "f"(x), "f"(y));
}
// Asks for the line of `p` to be in the L2 cache.
DEVICE void ask_for(const void* p) { asm volatile("prefetch.global.L2 [%0];" : : "l"(p)); }
DEVICE float as_float(uint32_t x) { return __uint_as_float(x); }
DEVICE uint32_t as_word(float x) { return __float_as_uint(x); }

DEVICE void store_shared_32(uint32_t address, uint32_t x) {
  asm volatile("st.shared.u32 [%0], %1;" : : "r"(address), "r"(x) : "memory");
}
DEVICE void store_shared_64(uint32_t address, uint32_t x, uint32_t y) {
  asm volatile("st.shared.v2.u32 [%0], {%1,%2};" : : "r"(address), "r"(x), "r"(y) : "memory");
}
DEVICE void store_shared_128(uint32_t address, uint32_t (&x)[4]) {
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" : : "r"(address), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
}
DEVICE void load_shared_128(uint32_t address, uint32_t (&r)[4]) {
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address)
               : "memory");
}
DEVICE void load_shared_64(uint32_t address, uint32_t (&r)[2]) {
  asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(address) : "memory");
}
DEVICE uint32_t load_shared_32(uint32_t address) {
  uint32_t out;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(out) : "r"(address) : "memory");
  return out;
}
DEVICE uint32_t load_shared_16(uint32_t address) {
  uint16_t out;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(out) : "r"(address) : "memory");
  return out;
}
DEVICE float load_shared_float(uint32_t address) { return __uint_as_float(load_shared_32(address)); }
DEVICE void store_shared_float(uint32_t address, float x) { store_shared_32(address, __float_as_uint(x)); }
