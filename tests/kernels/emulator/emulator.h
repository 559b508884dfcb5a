// Runs a block of a CUDA kernel on a CPU: every thread is a fiber, and the words of warp.cuh that a warp says together
// wait for all its lanes. Counts how often the lanes that shared memory serves together read one bank at two places.
#include <ucontext.h>

#include <algorithm>
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
long least, wavefronts;  // of gathers: how many there must be, how many there are
const uint8_t *first_code[3], *end_of_codes[3];  // buffers of codes and of bits: nothing beyond them may be read
inline bool is_code(const uint8_t* p, int bytes) {
  for (int i = 0; i < 3; i++)
    if (p >= first_code[i] && p + bytes <= end_of_codes[i]) return true;
  return false;
}

enum Word { NONE, GATHER, TRANSPOSE, MULTIPLY_ADD, SHUFFLE_XOR, ANY };
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
  bool done = false, has_waited = false;
};
std::vector<Fiber> fibers;
std::vector<Warp> warps;
ucontext_t scheduler;
int current, block_arrived;
long block_generation;
uint32_t copied_from, copied_to;  // of shared memory, by `copy_to_shared`
struct Barrier {
  int arrived = 0, threads = 0;
  long generation = 0;
} barriers[16];

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

// All lanes read `argument` words: 8, 16 or 32 lanes are served together, and a bank gives one word at a time.
inline void gather(Warp& w) {
  const int words = w.lanes[0].argument;
  for (int first = 0; first < 32; first += 32 / words) {
    std::vector<uint32_t> read[32];
    size_t most = 0;
    for (int lane = first; lane < first + 32 / words; lane++)
      for (int k = 0; k < words; k++) {
        const uint32_t address = w.lanes[lane].address + 4 * k;
        std::vector<uint32_t>& bank = read[address / 4 % 32];
        if (std::find(bank.begin(), bank.end(), address) == bank.end()) bank.push_back(address);
        most = std::max(most, bank.size());
      }
    least++;
    wavefronts += most;
  }
  for (int lane = 0; lane < 32; lane++) memcpy(w.lanes[lane].out, at(w.lanes[lane].address, 4 * words), 4 * words);
}
inline void transpose(Warp& w) {
  for (int lane = 0; lane < 32; lane++) {
    w.lanes[lane].out[0] = 0;
    for (int i = 0; i < 2; i++) {
      const uint32_t word = w.lanes[(2 * (lane % 4) + i) * 4 + lane / 8].in[0];
      w.lanes[lane].out[0] |= (word >> (16 * (lane / 4 % 2)) & 0xffffu) << (16 * i);
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
    case GATHER: gather(w); break;
    case TRANSPOSE: transpose(w); break;
    case MULTIPLY_ADD: multiply(w); break;
    case SHUFFLE_XOR:
      for (int lane = 0; lane < 32; lane++) w.lanes[lane].c[0] = values[lane ^ w.lanes[lane].argument];
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
  if (!fibers[current].has_waited) fail("leaves while copies are on their way");
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
inline void sync_block() {
  using namespace emulator;
  if (++block_arrived == (int)fibers.size()) {
    block_arrived = 0;
    block_generation++;
  } else {
    for (long before = block_generation; block_generation == before;) yield();
  }
}
inline void sync_some(int barrier, int threads) {
  using namespace emulator;
  if (barrier < 1 || barrier > 15 || threads % 32) fail("no such barrier");
  Barrier& b = barriers[barrier];
  if (b.arrived && b.threads != threads) fail("a barrier for different numbers of threads");
  b.threads = threads;
  if (++b.arrived == threads) {
    b.arrived = 0;
    b.generation++;
  } else {
    for (long before = b.generation; b.generation == before;) yield();
  }
}
template <int BYTES, int THREADS>
inline void copy_to_shared(uint32_t to, const uint8_t* from, uint32_t arrivals, int thread) {
  using namespace emulator;
  if (thread == 0) {
    if (to % 128 || (uintptr_t)from % 16 || BYTES % 16 || arrivals % 8) fail("misaligned copy");
    if (THREADS != (int)fibers.size()) fail("not all threads copy");
    memcpy(at(to, 16), from, BYTES);
    copied_from = to, copied_to = to + BYTES;
  }
  sync_block();
}
inline void wait_for_copy(uint32_t) { emulator::fibers[emulator::current].has_waited = true; }
template <int OFFSET, int WORDS>
inline void load_settled(uint32_t address, uint32_t (&r)[WORDS]) {
  using namespace emulator;
  const bool copied = address + OFFSET >= copied_from && address + OFFSET < copied_to;
  if (copied && !fibers[current].has_waited) fail("reads what is on its way");
  emulator::mine().address = address + OFFSET;
  emulator::mine().argument = WORDS;
  memcpy(r, emulator::together(emulator::GATHER).out, 4 * WORDS);
}
inline uint32_t settled(uint32_t address) { return address; }
inline uint32_t transpose_matrix(uint32_t x) {
  emulator::mine().in[0] = x;
  return emulator::together(emulator::TRANSPOSE).out[0];
}
inline void multiply_add(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  const uint32_t in[6] = {a0, a1, a2, a3, b0, b1};
  memcpy(emulator::mine().in, in, sizeof in);
  memcpy(emulator::mine().c, c, sizeof c);
  memcpy(c, emulator::together(emulator::MULTIPLY_ADD).c, sizeof c);
}
inline uint32_t multiply_add_half2(uint32_t a, uint32_t b, uint32_t c) {
  using namespace emulator;
  uint32_t out = 0;
  for (int i = 0; i < 2; i++)
    out |= (uint32_t)to_half((double)element(a, i) * element(b, i) + element(c, i)) << (16 * i);
  return out;
}
inline uint32_t add_half2(uint32_t a, uint32_t b) { return multiply_add_half2(a, 0x3c003c00u, b); }
inline void turn(uint32_t& x, uint32_t& y, uint32_t cosine, uint32_t sine) {
  const uint32_t across = multiply_add_half2(y, sine, 0) ^ 0x80008000u, up = multiply_add_half2(x, sine, 0);
  x = multiply_add_half2(x, cosine, across);
  y = multiply_add_half2(y, cosine, up);
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
inline int smaller(int a, int b) { return a < b ? a : b; }
inline float largest(float a, float b) { return fmaxf(a, b); }
inline float shuffle_xor(float x, int lanes) {
  emulator::mine().c[0] = x;
  emulator::mine().argument = lanes;
  return emulator::together(emulator::SHUFFLE_XOR).c[0];
}
inline uint32_t shuffle_xor(uint32_t x, int lanes) {
  float bits;
  memcpy(&bits, &x, 4);
  bits = shuffle_xor(bits, lanes);
  memcpy(&x, &bits, 4);
  return x;
}
inline int uniform(int x) { return x; }
inline bool any_lane(bool x) {
  emulator::mine().argument = x;
  return emulator::together(emulator::ANY).argument;
}
template <int BYTES>
inline void load_once(const uint8_t* p, uint32_t* r) {
  if ((uintptr_t)p % BYTES) emulator::fail("misaligned load");
  if (!emulator::is_code(p, BYTES)) emulator::fail("load beyond the codes");
  r[0] = 0;
  memcpy(r, p, BYTES);
}
template <int BYTES>
inline void load_kept(const uint8_t* p, uint32_t* r) {
  load_once<BYTES>(p, r);
}
inline void load_128(const void* p, uint32_t (&r)[4]) {
  if ((uintptr_t)p % 16) emulator::fail("misaligned load");
  memcpy(r, p, 16);
}
inline void load_64(const void* p, uint32_t (&r)[2]) {
  if ((uintptr_t)p % 8) emulator::fail("misaligned load");
  memcpy(r, p, 8);
}
inline void store_64(float* p, float x, float y) {
  if ((uintptr_t)p % 8) emulator::fail("misaligned store");
  p[0] = x, p[1] = y;
}
inline void ask_for(const void*) {}
inline float as_float(uint32_t x) {
  float out;
  memcpy(&out, &x, 4);
  return out;
}
inline uint32_t as_word(float x) {
  uint32_t out;
  memcpy(&out, &x, 4);
  return out;
}
inline void store_shared_32(uint32_t address, uint32_t x) { memcpy(emulator::at(address, 4), &x, 4); }
inline void store_shared_64(uint32_t address, uint32_t x, uint32_t y) {
  const uint32_t both[2] = {x, y};
  memcpy(emulator::at(address, 8), both, 8);
}
inline void store_shared_128(uint32_t address, uint32_t (&x)[4]) { memcpy(emulator::at(address, 16), x, 16); }
inline void load_shared_128(uint32_t address, uint32_t (&r)[4]) { memcpy(r, emulator::at(address, 16), 16); }
inline void load_shared_64(uint32_t address, uint32_t (&r)[2]) { memcpy(r, emulator::at(address, 8), 8); }
inline uint32_t load_shared_16(uint32_t address) {
  uint16_t out;
  memcpy(&out, emulator::at(address, 2), 2);
  return out;
}
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
