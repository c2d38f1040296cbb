// Vectors by the compiler's own vector types, so that one source serves every instruction set.
// Included once for each instruction set, inside that set's namespace, with JAXLLM_LANES as wide as its
// registers and JAXLLM_SUMS as many sums as they hold beside the operands of a product.

constexpr int kLanes = JAXLLM_LANES;
constexpr int kSums = JAXLLM_SUMS;

typedef float F __attribute__((vector_size(4 * kLanes)));
typedef float Fu __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t I __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Uu __attribute__((vector_size(4 * kLanes), aligned(2), may_alias));
typedef uint16_t H __attribute__((vector_size(2 * kLanes)));
typedef uint16_t Hu __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));

INLINE F broadcast(float x) { return x - F{}; }
INLINE U broadcast(uint32_t x) { return x | U{}; }
INLINE F load(const float* p) { return *reinterpret_cast<const Fu*>(p); }
INLINE U load(const uint32_t* p) { return *reinterpret_cast<const Uu*>(p); }
INLINE U load_bits(const void* p) { return *reinterpret_cast<const Uu*>(p); }
INLINE void store(float* p, F x) { *reinterpret_cast<Fu*>(p) = x; }
INLINE void store(uint32_t* p, U x) { *reinterpret_cast<Uu*>(p) = x; }

// bfloat16 is the upper half of a float32.
INLINE F widen(H x) { return (F)(__builtin_convertvector(x, U) << 16); }
INLINE F load_bf16(const uint16_t* p) { return widen(*reinterpret_cast<const Hu*>(p)); }

// The first n elements, zero behind them.
INLINE F load_bf16(const uint16_t* p, int64_t n) {
  if (n >= kLanes) return load_bf16(p);
  uint16_t padded[kLanes] = {};
  if (n > 0) std::memcpy(padded, p, n * sizeof(uint16_t));
  return load_bf16(padded);
}

// Rounds to nearest even; a NaN stays one.
INLINE H narrow(F x) {
#ifdef JAXLLM_DOT_BF16
  return (H)_mm512_cvtneps_pbh((__m512)x);
#else
  const U bits = (U)x;
  const U rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(x == x ? rounded : (bits >> 16) | 0x40, H);
#endif
}
INLINE void store_bf16(uint16_t* p, F x) { *reinterpret_cast<Hu*>(p) = narrow(x); }

// What a product multiplies: where there is an instruction for it, pairs of bfloat16 as they lie in
// memory, the first one low; else each of the two as a float.
#ifdef JAXLLM_DOT_BF16
constexpr int kPerPair = 1;
typedef uint32_t Element;
INLINE U part(U pairs, int) { return pairs; }
INLINE F dot(F sum, U a, U b) { return (F)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
#else
constexpr int kPerPair = 2;
typedef float Element;
INLINE F part(U pairs, int i) { return (F)(i ? pairs & 0xFFFF0000u : pairs << 16); }
INLINE F dot(F sum, F a, F b) { return sum + a * b; }
#endif

// Elements of num_pairs pairs of bfloat16.
INLINE void to_elements(const void* pairs, int64_t num_pairs, Element* elements) {
#ifdef JAXLLM_DOT_BF16
  std::memcpy(elements, pairs, num_pairs * sizeof(uint32_t));
#else
  const uint16_t* source = static_cast<const uint16_t*>(pairs);
  int64_t i = 0;
  for (; i + kLanes <= 2 * num_pairs; i += kLanes) store(elements + i, load_bf16(source + i));
  for (; i < 2 * num_pairs; ++i) {
    const uint32_t bits = static_cast<uint32_t>(source[i]) << 16;
    std::memcpy(elements + i, &bits, sizeof bits);
  }
#endif
}

// How many vectors of sums each of so many rows can have in registers: a power of two, at most `most`.
constexpr int vectors_at_once(int rows, int most) {
  int n = 1;
  while (2 * n <= most && 2 * n * rows <= kSums) n *= 2;
  return n;
}

// e^x to a few units in the last place; 0 below -87, the largest float's order above 88.
INLINE F exp(F x) {
  const F low = broadcast(-87.0f), high = broadcast(88.0f);
  F y = x < low ? low : x;
  y = y > high ? high : y;
  const F shifter = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const F n = (y * 1.44269504f + shifter) - shifter;
  const F r = (y - n * 0.693359375f) - n * -2.12194440e-4f;
  F p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const I scale = (__builtin_convertvector(n, I) + 127) << 23;
  p *= (F)scale;
  return x < low ? F{} : p;
}

INLINE F max(F a, F b) { return a > b ? a : b; }

INLINE float reduce_max(F x) {
  float result = x[0];
  for (int i = 1; i < kLanes; ++i) result = x[i] > result ? x[i] : result;
  return result;
}
INLINE float reduce_sum(F x) {
  float lanes[kLanes];
  store(lanes, x);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// Calls f with min(R, n) rows as a constant, so that the sums of all rows are in registers.
template <int R, typename Function>
INLINE void with_rows(int64_t n, const Function& f) {
  if constexpr (R > 1) {
    if (n < R) return with_rows<R - 1>(n, f);
  }
  f(std::integral_constant<int, R>{});
}

template <int... Lane>
INLINE constexpr I lane_numbers(std::integer_sequence<int, Lane...>) {
  return I{Lane...};
}

// Swaps one bit of the row's number with the same bit of the column's.
template <int Bit, int... Lane>
INLINE void transpose_bit(U rows[kLanes], std::integer_sequence<int, Lane...>) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & Bit) continue;
    const U a = rows[i], b = rows[i + Bit];
    rows[i] = __builtin_shuffle(a, b, I{(Lane & Bit ? kLanes + (Lane ^ Bit) : Lane)...});
    rows[i + Bit] = __builtin_shuffle(a, b, I{(Lane & Bit ? kLanes + Lane : Lane ^ Bit)...});
  }
}

// rows[i][j] becomes rows[j][i].
INLINE void transpose(U rows[kLanes]) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>{};
  transpose_bit<1>(rows, lanes);
  transpose_bit<2>(rows, lanes);
  if constexpr (kLanes >= 8) transpose_bit<4>(rows, lanes);
  if constexpr (kLanes >= 16) transpose_bit<8>(rows, lanes);
}

INLINE void store_columns(float* out, F x, int64_t n) {
  if (n >= kLanes) return store(out, x);
  float lanes[kLanes];
  store(lanes, x);
  if (n > 0) std::memcpy(out, lanes, n * sizeof(float));
}
INLINE void store_columns(uint16_t* out, F x, int64_t n) {
  if (n >= kLanes) return store_bf16(out, x);
  uint16_t lanes[kLanes];
  store_bf16(lanes, x);
  if (n > 0) std::memcpy(out, lanes, n * sizeof(uint16_t));
}
