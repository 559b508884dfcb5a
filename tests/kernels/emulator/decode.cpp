// The CUDA decode kernel as a function of a shared library: every block in turn.
#include "emulator.h"

#include "layout.cuh"
#include "packed_codes.cuh"
#include "decode_codes.cuh"
#include "decode_exact.cuh"

#define DECODE_KERNEL(...)
#include "decode_attention.cu"

#ifndef SHAPE
#error "SHAPE is missing"
#endif
typedef SHAPE KernelShape;
static const Arguments* arguments;
static int block;

static void one_thread(int thread) { decode<KernelShape>(*arguments, block, thread, emulator::shared); }

extern "C" int shared_bytes() { return KernelShape::BYTES; }
extern "C" int tiles() { return KernelShape::TILES; }
extern "C" int arguments_bytes() { return sizeof(Arguments); }
extern "C" void counters(long* least, long* wavefronts) {
  *least = emulator::least;
  *wavefronts = emulator::wavefronts;
}
extern "C" void run(const Arguments* a) {
  arguments = a;
  const uint8_t* const starts[3] = {a->key_codes, a->value_codes, a->exact_bits};
  const int64_t widths[3] = {(int64_t)a->capacity * KernelShape::Key::WIDTH,
                             (int64_t)a->capacity * KernelShape::Value::WIDTH, a->bits_width};
  for (int i = 0; i < 3; i++) {
    emulator::first_code[i] = starts[i];
    emulator::end_of_codes[i] = starts[i] + a->batch * a->heads * widths[i];
  }
  emulator::least = emulator::wavefronts = 0;
  for (block = 0; block < a->heads * a->blocks_per_head; block++) emulator::run_block(KernelShape::THREADS, one_thread);
}
