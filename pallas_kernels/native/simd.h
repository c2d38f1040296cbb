// Vectors of 16 lanes by the compiler's own vector types, so that one source serves every
// instruction set. Included once for each instruction set, inside that set's namespace.

constexpr int kLanes = 16;

typedef float F16 __attribute__((vector_size(64)));
typedef float F16u __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t I16 __attribute__((vector_size(64)));
typedef uint32_t U16 __attribute__((vector_size(64)));
typedef uint32_t U16u __attribute__((vector_size(64), aligned(2), may_alias));
typedef uint16_t H16 __attribute__((vector_size(32)));
typedef uint16_t H16u __attribute__((vector_size(32), aligned(2), may_alias));

INLINE F16 broadcast(float x) { return x - F16{}; }
INLINE U16 broadcast_bits(uint32_t x) { return x | U16{}; }
INLINE F16 load(const float* p) { return *reinterpret_cast<const F16u*>(p); }
INLINE U16 load_bits(const void* p) { return *reinterpret_cast<const U16u*>(p); }
INLINE void store(float* p, F16 x) { *reinterpret_cast<F16u*>(p) = x; }

// bfloat16 is the upper half of a float32.
INLINE F16 widen(H16 x) { return (F16)(__builtin_convertvector(x, U16) << 16); }
INLINE F16 load_bf16(const uint16_t* p) { return widen(*reinterpret_cast<const H16u*>(p)); }

// The first n < 16 elements, zero behind them.
INLINE F16 load_bf16(const uint16_t* p, int n) {
  uint16_t padded[kLanes] = {};
  std::memcpy(padded, p, n * sizeof(uint16_t));
  return load_bf16(padded);
}

// Rounds to nearest even; a NaN stays one.
INLINE H16 narrow(F16 x) {
#ifdef JAXLLM_DOT_BF16
  return (H16)_mm512_cvtneps_pbh((__m512)x);
#else
  const U16 bits = (U16)x;
  const U16 rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(x == x ? rounded : (bits >> 16) | 0x40, H16);
#endif
}
INLINE void store_bf16(uint16_t* p, F16 x) { *reinterpret_cast<H16u*>(p) = narrow(x); }

// sum + a0 * b0 + a1 * b1, where a lane of a and b holds a pair of bfloat16, the first one low.
INLINE F16 dot_pairs(F16 sum, U16 a, U16 b) {
#ifdef JAXLLM_DOT_BF16
  return (F16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
  sum += (F16)(a << 16) * (F16)(b << 16);
  return sum + (F16)(a & 0xFFFF0000u) * (F16)(b & 0xFFFF0000u);
#endif
}

// e^x to a few units in the last place; 0 below -87, the largest float's order above 88.
INLINE F16 exp16(F16 x) {
  const F16 low = broadcast(-87.0f), high = broadcast(88.0f);
  F16 y = x < low ? low : x;
  y = y > high ? high : y;
  const F16 shifter = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const F16 n = (y * 1.44269504f + shifter) - shifter;
  const F16 r = (y - n * 0.693359375f) - n * -2.12194440e-4f;
  F16 p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const I16 scale = (__builtin_convertvector(n, I16) + 127) << 23;
  p *= (F16)scale;
  return x < low ? F16{} : p;
}

INLINE F16 max16(F16 a, F16 b) { return a > b ? a : b; }

INLINE float reduce_max(F16 x) {
  float result = x[0];
  for (int i = 1; i < kLanes; ++i) result = x[i] > result ? x[i] : result;
  return result;
}
INLINE float reduce_sum(F16 x) {
  float lanes[kLanes];
  store(lanes, x);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// Calls f with min(R, n) rows as a constant, so that the sums of all rows are in registers.
template <int R, typename F>
INLINE void with_rows(int64_t n, const F& f) {
  if constexpr (R > 1) {
    if (n < R) return with_rows<R - 1>(n, f);
  }
  f(std::integral_constant<int, R>{});
}

// rows[i][j] becomes rows[j][i].
INLINE void transpose(U16 rows[kLanes]) {
#define JAXLLM_STAGE(WIDTH, LOW, HIGH)                         \
  _Pragma("GCC unroll 16") for (int i = 0; i < kLanes; ++i)                             \
    if (!(i & WIDTH)) {                                        \
      const U16 a = rows[i], b = rows[i + WIDTH];              \
      rows[i] = __builtin_shuffle(a, b, (I16)LOW);             \
      rows[i + WIDTH] = __builtin_shuffle(a, b, (I16)HIGH);    \
    }
  // Each stage swaps one bit of the row's number with the same bit of the column's.
  JAXLLM_STAGE(1, (I16{0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30}),
               (I16{1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31}))
  JAXLLM_STAGE(2, (I16{0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29}),
               (I16{2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31}))
  JAXLLM_STAGE(4, (I16{0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27}),
               (I16{4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31}))
  JAXLLM_STAGE(8, (I16{0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23}),
               (I16{8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31}))
#undef JAXLLM_STAGE
}
