// Kernels for the CPU as XLA custom calls: what XLA's own code is slow at there. Each is compiled
// for several instruction sets; the best that the processor has is taken at run time.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace jaxllm {

// Calls a function with each number below n, on several threads.
struct ParallelFor {
  int64_t num_threads;
  std::function<void(int64_t n, const std::function<void(int64_t)>& function)> run;
  void operator()(int64_t n, const std::function<void(int64_t)>& function) const {
    run(n, function);
  }
};

struct Matmul {
  const uint32_t* x;       // [num_rows, num_pairs], pairs of bfloat16
  const uint32_t* kernel;  // [num_panels, num_pairs, 32]
  void* out;               // [num_rows, num_columns], float32 or bfloat16
  int64_t num_rows, num_pairs, num_panels, num_columns;
  bool is_float, swiglu;
};

struct Attention {
  const uint16_t* q;  // [T, H, D]
  uint16_t* out;      // [T, H, D]
  uint16_t* pool;     // [N, B, 2K, D] of one layer
  const int32_t *seq_lens, *block_tables, *query_start;
  const float *sinks, *k_scale, *v_scale;  // [H] or null, [K], [K]
  int64_t num_seqs, max_blocks, block_size, num_heads, num_kv_heads, head_dim, group;
  int64_t window;  // 0: none
  float scale, soft_cap;

  // All heads of one token.
  uint16_t* place(int64_t block, int64_t offset) const {
    return pool + (block * block_size + offset) * 2 * num_kv_heads * head_dim;
  }
};

#define INLINE inline __attribute__((always_inline))

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define JAXLLM_HAS_VARIANTS 1
#define JAXLLM_LANES 8
#define JAXLLM_SUMS 12
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#include "simd.h"
#include "matmul.h"
#include "attention.h"
}  // namespace avx2
#pragma GCC pop_options
#undef JAXLLM_LANES
#undef JAXLLM_SUMS
#define JAXLLM_LANES 16
#define JAXLLM_SUMS 24
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
namespace avx512 {
#include "simd.h"
#include "matmul.h"
#include "attention.h"
}  // namespace avx512
#pragma GCC target("avx512bf16")
#define JAXLLM_DOT_BF16 1
namespace avx512bf16 {
#include "simd.h"
#include "matmul.h"
#include "attention.h"
}  // namespace avx512bf16
#if __GNUC__ >= 11
#define JAXLLM_HAS_TILES 1
#pragma GCC target("amx-tile,amx-bf16")
#define JAXLLM_TILES 1
namespace amx {
#include "simd.h"
#include "matmul.h"
#include "attention.h"
}  // namespace amx
#undef JAXLLM_TILES
#endif
#undef JAXLLM_DOT_BF16
#pragma GCC pop_options
#undef JAXLLM_LANES
#undef JAXLLM_SUMS
#endif

#define JAXLLM_LANES 4
#if defined(__aarch64__)
#define JAXLLM_SUMS 24
#else
#define JAXLLM_SUMS 12
#endif
namespace baseline {
#include "simd.h"
#include "matmul.h"
#include "attention.h"
}  // namespace baseline

// Kernels for one instruction set.
struct Variant {
  const char* name;
  bool is_supported;
  void (*matmul)(const Matmul&, const ParallelFor&);
  void (*attention)(const Attention&, const ParallelFor&);
};

#ifdef JAXLLM_HAS_VARIANTS
bool has_tiles() {
#if JAXLLM_HAS_TILES && defined(__linux__)  // which gives tiles only to a process that asks
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
const bool kHasAvx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
const bool kHasAvx512 = kHasAvx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512dq");
const bool kHasBf16 = kHasAvx512 && __builtin_cpu_supports("avx512bf16");
#endif

// The best first.
const Variant kVariants[] = {
#ifdef JAXLLM_HAS_TILES
    {"amx", kHasBf16 && has_tiles(), amx::matmul, amx::attention},
#endif
#ifdef JAXLLM_HAS_VARIANTS
    {"avx512bf16", kHasBf16, avx512bf16::matmul, avx512bf16::attention},
    {"avx512", kHasAvx512, avx512::matmul, avx512::attention},
    {"avx2", kHasAvx2, avx2::matmul, avx2::attention},
#endif
    {"baseline", true, baseline::matmul, baseline::attention},
};
std::atomic<const Variant*> variant =
    std::find_if(std::begin(kVariants), std::end(kVariants),
                 [](const Variant& v) { return v.is_supported; });

// On XLA's threads and the caller's. It never waits for a thread that has not begun: all of them may
// be blocked in calls like this one.
ParallelFor parallel_on(ffi::ThreadPool& threads) {
  const auto run = [&threads](int64_t n, const std::function<void(int64_t)>& function) {
    struct Shared {
      std::atomic<int64_t> next{0}, num_done{0};
    };
    auto shared = std::make_shared<Shared>();
    // What is left when a helper begins late is nothing: then it does not touch `function`.
    auto work = [shared, n, &function] {
      for (int64_t i; (i = shared->next.fetch_add(1)) < n;) {
        function(i);
        shared->num_done.fetch_add(1, std::memory_order_release);
      }
    };
    const int64_t num_helpers = std::min<int64_t>(threads.num_threads(), n) - 1;
    for (int64_t i = 0; i < num_helpers; ++i) threads.Schedule(decltype(work)(work));
    work();
    while (shared->num_done.load(std::memory_order_acquire) < n) {
#if defined(__x86_64__)
      _mm_pause();
#endif
    }
  };
  return {threads.num_threads(), run};
}

template <ffi::DataType type>
void clear_rows(ffi::Result<ffi::Buffer<type>>& out, int64_t first_row, int64_t row_bytes) {
  char* data = reinterpret_cast<char*>(out->typed_data());
  std::memset(data + first_row * row_bytes, 0, out->size_bytes() - first_row * row_bytes);
}

// x [.., num_pairs * 2] bfloat16, kernels [num_layers, num_panels, num_pairs, 32] uint32.
template <ffi::DataType out_type>
ffi::Error MatmulImpl(ffi::ThreadPool threads, ffi::Buffer<ffi::BF16> x,
                      ffi::Buffer<ffi::U32> kernels, ffi::Buffer<ffi::S32> layer,
                      ffi::Buffer<ffi::S32> num_rows, bool swiglu,
                      ffi::Result<ffi::Buffer<out_type>> out) {
  const auto shape = kernels.dimensions();
  const int64_t all_rows = out->dimensions()[0];
  Matmul m;
  m.num_panels = shape[1];
  m.num_pairs = shape[2];
  m.num_columns = out->dimensions()[1];
  m.num_rows = std::clamp<int64_t>(num_rows.typed_data()[0], 0, all_rows);
  const int64_t l = std::clamp<int64_t>(layer.typed_data()[0], 0, shape[0] - 1);
  m.x = reinterpret_cast<const uint32_t*>(x.untyped_data());
  m.kernel = kernels.typed_data() + l * m.num_panels * m.num_pairs * 32;
  m.out = out->untyped_data();
  m.is_float = out_type == ffi::F32;
  m.swiglu = swiglu;
  if (m.num_rows) variant.load()->matmul(m, parallel_on(threads));
  clear_rows<out_type>(out, m.num_rows, m.num_columns * (m.is_float ? 4 : 2));
  return ffi::Error::Success();
}

void write_new_tokens(const Attention& a, const uint16_t* k, const uint16_t* v) {
  const int64_t row = a.num_kv_heads * a.head_dim;
  for (int64_t s = 0; s < a.num_seqs; ++s) {
    const int64_t end = a.query_start[s + 1];
    for (int64_t t = a.query_start[s]; t < end; ++t) {
      const int64_t p = a.seq_lens[s] - (end - t);
      const int32_t block = a.block_tables[s * a.max_blocks + p / a.block_size];
      uint16_t* place = a.place(block, p % a.block_size);
      for (int64_t h = 0; h < a.num_kv_heads; ++h) {
        const int64_t source = t * row + h * a.head_dim;
        std::memcpy(place + 2 * h * a.head_dim, k + source, a.head_dim * 2);
        std::memcpy(place + (2 * h + 1) * a.head_dim, v + source, a.head_dim * 2);
      }
    }
  }
}

ffi::Error AttentionImpl(ffi::ThreadPool threads, ffi::Buffer<ffi::BF16> q,
                         ffi::Buffer<ffi::BF16> k, ffi::Buffer<ffi::BF16> v,
                         ffi::Buffer<ffi::U16> pool_in, ffi::Buffer<ffi::S32> layer,
                         ffi::Buffer<ffi::S32> seq_lens, ffi::Buffer<ffi::S32> block_tables,
                         ffi::Buffer<ffi::S32> query_start, ffi::Buffer<ffi::S32> num_seqs,
                         ffi::Buffer<ffi::S32> window, ffi::Buffer<ffi::F32> sinks,
                         ffi::Buffer<ffi::F32> k_scale, ffi::Buffer<ffi::F32> v_scale, float scale,
                         float soft_cap, ffi::Result<ffi::Buffer<ffi::BF16>> out,
                         ffi::Result<ffi::Buffer<ffi::U16>> pool) {
  const auto shape = pool->dimensions();  // [L, N, B, 2K, D]
  if (pool->typed_data() != pool_in.typed_data())  // XLA found no way to update it in place
    std::memcpy(pool->typed_data(), pool_in.typed_data(), pool->size_bytes());
  Attention a;
  a.q = reinterpret_cast<const uint16_t*>(q.untyped_data());
  a.out = reinterpret_cast<uint16_t*>(out->untyped_data());
  const int64_t l = std::clamp<int64_t>(layer.typed_data()[0], 0, shape[0] - 1);
  a.pool = pool->typed_data() + l * shape[1] * shape[2] * shape[3] * shape[4];
  a.seq_lens = seq_lens.typed_data();
  a.block_tables = block_tables.typed_data();
  a.query_start = query_start.typed_data();
  a.sinks = sinks.element_count() ? sinks.typed_data() : nullptr;
  a.k_scale = k_scale.typed_data();
  a.v_scale = v_scale.typed_data();
  a.num_seqs = num_seqs.typed_data()[0];
  a.max_blocks = block_tables.dimensions()[1];
  a.block_size = shape[2];
  a.num_heads = q.dimensions()[1];
  a.num_kv_heads = shape[3] / 2;
  a.head_dim = shape[4];
  a.group = a.num_heads / a.num_kv_heads;
  a.window = window.typed_data()[0];
  a.scale = scale;
  a.soft_cap = soft_cap;
  write_new_tokens(a, reinterpret_cast<const uint16_t*>(k.untyped_data()),
                   reinterpret_cast<const uint16_t*>(v.untyped_data()));
  variant.load()->attention(a, parallel_on(threads));
  clear_rows<ffi::BF16>(out, a.query_start[a.num_seqs], a.num_heads * a.head_dim * 2);
  return ffi::Error::Success();
}

// Memory whose content does not matter: what is never written takes no room.
ffi::Error ReserveImpl(ffi::Result<ffi::Buffer<ffi::U16>>) { return ffi::Error::Success(); }

}  // namespace jaxllm

// The name of the variant in use.
extern "C" const char* jaxllm_variant() { return jaxllm::variant.load()->name; }

// Takes another one. Returns whether there is one of that name that the processor can run.
extern "C" bool jaxllm_use_variant(const char* name) {
  for (const jaxllm::Variant& v : jaxllm::kVariants) {
    if (!v.is_supported || std::strcmp(v.name, name)) continue;
    jaxllm::variant = &v;
    return true;
  }
  return false;
}

#define JAXLLM_MATMUL(NAME, TYPE)                                                           \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(NAME, jaxllm::MatmulImpl<TYPE>,                             \
                                ffi::Ffi::Bind()                                            \
                                    .Ctx<ffi::ThreadPool>()                                 \
                                    .Arg<ffi::Buffer<ffi::BF16>>()                          \
                                    .Arg<ffi::Buffer<ffi::U32>>()                           \
                                    .Arg<ffi::Buffer<ffi::S32>>()                           \
                                    .Arg<ffi::Buffer<ffi::S32>>()                           \
                                    .Attr<bool>("swiglu")                                   \
                                    .Ret<ffi::Buffer<TYPE>>())

JAXLLM_MATMUL(jaxllm_matmul_f32, ffi::F32);
JAXLLM_MATMUL(jaxllm_matmul_bf16, ffi::BF16);

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxllm_attention, jaxllm::AttentionImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Arg<ffi::Buffer<ffi::U16>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("scale")
                                  .Attr<float>("soft_cap")
                                  .Ret<ffi::Buffer<ffi::BF16>>()
                                  .Ret<ffi::Buffer<ffi::U16>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxllm_reserve, jaxllm::ReserveImpl,
                              ffi::Ffi::Bind().Ret<ffi::Buffer<ffi::U16>>());
