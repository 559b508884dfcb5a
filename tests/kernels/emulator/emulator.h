// Runs a block of a CUDA kernel on a CPU: every thread is a fiber, and the words of warp.cuh that a warp says together
// wait for all its lanes. Counts how often reads of 8 x 8 matrices find two rows in one 16-byte column of shared memory.
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define EMULATED 1
#define DEVICE inline
#define SHARED_BYTES 232448

namespace emulator {
alignas(1024) uint8_t shared[SHARED_BYTES];
long matrices, wavefronts;

enum Word { NONE, MATRICES, TRANSPOSED, MULTIPLY_ADD, SHUFFLE_XOR, SHUFFLE, ANY, SYNC };
struct Lane {
  Word word;
  uint32_t address, in[6], out[4];
  float c[4];
  int argument;
};
struct Warp {
  Lane lanes[32];
  int arrived = 0;
  long generation = 0;
};
struct Fiber {
  ucontext_t context;
  std::vector<uint8_t> stack;
  bool done = false;
};
std::vector<Fiber> fibers;
std::vector<Warp> warps;
ucontext_t scheduler;
int current, block_arrived;
long block_generation;

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "thread %d: %s\n", current, what);
  abort();
}
inline void yield() { swapcontext(&fibers[current].context, &scheduler); }
inline uint8_t* at(uint32_t address, uint32_t size) {
  if (address % size || address + size > SHARED_BYTES) fail("misaligned or outside of shared memory");
  return shared + address;
}
inline float half(uint16_t x) {
  _Float16 h;
  memcpy(&h, &x, 2);
  return (float)h;
}
inline uint16_t to_half(double x) {
  _Float16 h = (_Float16)x;
  uint16_t out;
  memcpy(&out, &h, 2);
  return out;
}

inline void read_matrices(Warp& w, bool transposed) {
  for (int m = 0; m < 4; m++) {
    int used[8] = {0}, most = 0;
    uint32_t seen[8];
    for (int r = 0; r < 8; r++) {
      const uint32_t address = w.lanes[8 * m + r].address;
      int column = address / 16 % 8;
      bool again = false;
      for (int s = 0; s < r; s++) again |= seen[s] == address;  // the same bytes are read once
      seen[r] = address;
      if (!again) used[column]++;
      if (used[column] > most) most = used[column];
    }
    matrices++;
    wavefronts += most;
    for (int lane = 0; lane < 32; lane++) {
      uint16_t pair[2];
      for (int i = 0; i < 2; i++) {
        const int row = transposed ? 2 * (lane % 4) + i : lane / 4, column = transposed ? lane / 4 : 2 * (lane % 4) + i;
        memcpy(&pair[i], at(w.lanes[8 * m + row].address, 16) + 2 * column, 2);
      }
      w.lanes[lane].out[m] = pair[0] | (uint32_t)pair[1] << 16;
    }
  }
}
inline float element(uint32_t word, int i) { return half((uint16_t)(word >> (16 * i))); }
inline void multiply(Warp& w) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; lane++) {
    const int g = lane / 4, c = lane % 4;
    const uint32_t* in = w.lanes[lane].in;
    for (int i = 0; i < 2; i++) {
      a[g][2 * c + i] = element(in[0], i);
      a[g + 8][2 * c + i] = element(in[1], i);
      a[g][2 * c + 8 + i] = element(in[2], i);
      a[g + 8][2 * c + 8 + i] = element(in[3], i);
      b[2 * c + i][g] = element(in[4], i);
      b[2 * c + 8 + i][g] = element(in[5], i);
    }
  }
  for (int lane = 0; lane < 32; lane++)
    for (int k = 0; k < 4; k++) {
      const int m = lane / 4 + k / 2 * 8, n = 2 * (lane % 4) + k % 2;
      double sum = w.lanes[lane].c[k];
      for (int i = 0; i < 16; i++) sum += (double)a[m][i] * b[i][n];
      w.lanes[lane].c[k] = (float)sum;
    }
}
inline void answer(Warp& w) {
  for (int lane = 1; lane < 32; lane++)
    if (w.lanes[lane].word != w.lanes[0].word) fail("the lanes of a warp have parted");
  float values[32];
  bool any = false;
  for (int lane = 0; lane < 32; lane++) values[lane] = w.lanes[lane].c[0], any |= w.lanes[lane].argument != 0;
  switch (w.lanes[0].word) {
    case MATRICES: read_matrices(w, false); break;
    case TRANSPOSED: read_matrices(w, true); break;
    case MULTIPLY_ADD: multiply(w); break;
    case SHUFFLE_XOR:
      for (int lane = 0; lane < 32; lane++) w.lanes[lane].c[0] = values[lane ^ w.lanes[lane].argument];
      break;
    case SHUFFLE:
      for (int lane = 0; lane < 32; lane++) w.lanes[lane].c[0] = values[w.lanes[lane].argument % 32];
      break;
    case ANY:
      for (int lane = 0; lane < 32; lane++) w.lanes[lane].argument = any;
      break;
    default: break;
  }
}
inline Lane& together(Word word) {
  Warp& w = warps[current / 32];
  Lane& own = w.lanes[current % 32];
  own.word = word;
  if (++w.arrived == 32) {
    answer(w);
    w.arrived = 0;
    w.generation++;
  } else {
    for (long before = w.generation; w.generation == before;) yield();
  }
  return own;
}
inline Lane& mine() { return warps[current / 32].lanes[current % 32]; }

void (*body)(int thread);
inline void start() {
  body(current);
  fibers[current].done = true;
  swapcontext(&fibers[current].context, &scheduler);
}
inline void run_block(int threads, void (*function)(int)) {
  body = function;
  fibers = std::vector<Fiber>(threads);
  warps = std::vector<Warp>(threads / 32);
  block_arrived = 0;
  memset(shared, 0xff, SHARED_BYTES);  // NaN: what is read before it is written shows
  for (auto& f : fibers) {
    f.stack.resize(1 << 16);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data();
    f.context.uc_stack.ss_size = f.stack.size();
    f.context.uc_link = nullptr;
    makecontext(&f.context, start, 0);
  }
  for (int left = threads; left;)
    for (current = 0; current < threads; current++)
      if (!fibers[current].done) {
        swapcontext(&scheduler, &fibers[current].context);
        left -= fibers[current].done;
      }
}
}  // namespace emulator

inline uint32_t shared_address(const void* p) { return (uint32_t)((const uint8_t*)p - emulator::shared); }
inline void sync_warp() { emulator::together(emulator::SYNC); }
inline void sync_block() {
  using namespace emulator;
  if (++block_arrived == (int)fibers.size()) {
    block_arrived = 0;
    block_generation++;
  } else {
    for (long before = block_generation; block_generation == before;) yield();
  }
}
inline void load_matrices(uint32_t address, uint32_t (&r)[4]) {
  emulator::mine().address = address;
  memcpy(r, emulator::together(emulator::MATRICES).out, 16);
}
inline void load_settled_matrices(uint32_t address, uint32_t (&r)[4]) { load_matrices(address, r); }
inline uint32_t settled(uint32_t address) { return address; }
template <int OFFSET>
inline void load_settled_transposed(uint32_t address, uint32_t (&r)[4]) {
  emulator::mine().address = address + OFFSET;
  memcpy(r, emulator::together(emulator::TRANSPOSED).out, 16);
}
inline void multiply_add(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  const uint32_t in[6] = {a0, a1, a2, a3, b0, b1};
  memcpy(emulator::mine().in, in, sizeof in);
  memcpy(emulator::mine().c, c, sizeof c);
  memcpy(c, emulator::together(emulator::MULTIPLY_ADD).c, sizeof c);
}
inline void times_each(uint32_t xy, uint32_t factors, uint32_t& by_low, uint32_t& by_high) {
  using namespace emulator;
  uint32_t out[2] = {0, 0};
  for (int i = 0; i < 2; i++)
    for (int k = 0; k < 2; k++) out[k] |= (uint32_t)to_half((double)element(xy, i) * element(factors, k)) << (16 * i);
  by_low = out[0];
  by_high = out[1];
}
inline uint32_t pack_half2(float low, float high) {
  return emulator::to_half(low) | (uint32_t)emulator::to_half(high) << 16;
}
inline float half_to_float(uint16_t x) { return emulator::half(x); }
inline float bfloat_to_float(uint16_t x) {
  const uint32_t word = (uint32_t)x << 16;
  float out;
  memcpy(&out, &word, 4);
  return out;
}
inline uint32_t times_128_plus(uint32_t w, int byte, uint32_t base) { return base + 128 * ((w >> (8 * byte)) & 255u); }
inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = a | (uint64_t)b << 32;
  uint32_t out = 0;
  for (int i = 0; i < 4; i++) out |= (uint32_t)(both >> (8 * ((selector >> (4 * i)) & 7)) & 255) << (8 * i);
  return out;
}
inline float minus_infinity() { return -INFINITY; }
inline float exp2_fast(float x) { return exp2f(x); }
inline float sin_fast(float x) { return sinf(x); }
inline float cos_fast(float x) { return cosf(x); }
inline float fused_multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
inline float round_to_even(float x) { return rintf(x); }
inline float tanh_of(float x) { return tanhf(x); }
inline float largest(float a, float b) { return fmaxf(a, b); }
inline float shuffle_with(float x, int argument, emulator::Word word) {
  emulator::mine().c[0] = x;
  emulator::mine().argument = argument;
  return emulator::together(word).c[0];
}
inline float shuffle_xor(float x, int lanes) { return shuffle_with(x, lanes, emulator::SHUFFLE_XOR); }
inline float shuffle(float x, int lane) { return shuffle_with(x, lane, emulator::SHUFFLE); }
inline uint32_t shuffle_bits_with(uint32_t x, int argument, emulator::Word word) {
  float carried, out;
  memcpy(&carried, &x, 4);
  out = shuffle_with(carried, argument, word);
  memcpy(&x, &out, 4);
  return x;
}
inline uint32_t shuffle_bits(uint32_t x, int lane) { return shuffle_bits_with(x, lane, emulator::SHUFFLE); }
inline uint32_t shuffle_bits_xor(uint32_t x, int lanes) { return shuffle_bits_with(x, lanes, emulator::SHUFFLE_XOR); }
inline bool any_lane(bool x) {
  emulator::mine().argument = x;
  return emulator::together(emulator::ANY).argument;
}
template <class T>
inline T load_once(const uint8_t* p) {
  if ((uintptr_t)p % sizeof(T)) emulator::fail("misaligned load");
  T out;
  memcpy(&out, p, sizeof out);
  return out;
}
inline uint32_t load_once_16(const uint8_t* p) { return load_once<uint16_t>(p); }
inline uint32_t load_once_32(const uint8_t* p) { return load_once<uint32_t>(p); }
inline uint64_t load_once_64(const uint8_t* p) { return load_once<uint64_t>(p); }
inline void load_128(const void* p, uint32_t (&r)[4]) {
  if ((uintptr_t)p % 16) emulator::fail("misaligned load");
  memcpy(r, p, 16);
}
inline void load_64(const void* p, uint32_t (&r)[2]) {
  if ((uintptr_t)p % 8) emulator::fail("misaligned load");
  memcpy(r, p, 8);
}
inline uint32_t load_32(const void* p) { return load_once<uint32_t>((const uint8_t*)p); }
inline void ask_for(const void*) {}
inline float as_float(uint32_t x) {
  float out;
  memcpy(&out, &x, 4);
  return out;
}
inline void store_shared_16(uint32_t address, uint32_t x) {
  const uint16_t low = (uint16_t)x;
  memcpy(emulator::at(address, 2), &low, 2);
}
inline void store_shared_32(uint32_t address, uint32_t x) { memcpy(emulator::at(address, 4), &x, 4); }
inline void store_shared_128(uint32_t address, uint32_t (&x)[4]) { memcpy(emulator::at(address, 16), x, 16); }
inline uint32_t load_shared_32(uint32_t address) {
  uint32_t out;
  memcpy(&out, emulator::at(address, 4), 4);
  return out;
}
inline float load_shared_float(uint32_t address) {
  float out;
  memcpy(&out, emulator::at(address, 4), 4);
  return out;
}
inline void store_shared_float(uint32_t address, float x) { memcpy(emulator::at(address, 4), &x, 4); }
