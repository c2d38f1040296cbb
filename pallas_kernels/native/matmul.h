// Products of bfloat16 rows with packed kernels, see pallas_kernels/matmul/layout.py. Included once
// for each instruction set.

constexpr int kPanel = 2 * kLanes;  // columns of a panel

#ifdef JAXLLM_DOT_BF16
constexpr int kTileRows = 12;  // 24 sums, 2 vectors of the kernel and one of x fill 32 registers
#else
constexpr int kTileRows = 4;
#endif
constexpr int kBlockRows = 8 * kTileRows;  // rows that a panel meets before the next one is read

// Adds up R rows of x [.., num_pairs] times one panel [num_pairs, kPanel].
template <int R>
INLINE void panel_product(const uint32_t* x, const uint32_t* panel, int64_t num_pairs,
                          F16 sums[R][2]) {
  F16 s[R][2] = {};
  for (int64_t i = 0; i < num_pairs; ++i) {
    const U16 b0 = load_bits(panel + i * kPanel), b1 = load_bits(panel + i * kPanel + kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const U16 a = broadcast_bits(x[r * num_pairs + i]);
      s[r][0] = dot_pairs(s[r][0], a, b0);
      s[r][1] = dot_pairs(s[r][1], a, b1);
    }
  }
  for (int r = 0; r < R; ++r) sums[r][0] = s[r][0], sums[r][1] = s[r][1];
}

INLINE void store_columns(float* out, F16 x, int64_t n) {
  if (n >= kLanes) return store(out, x);
  float lanes[kLanes];
  store(lanes, x);
  if (n > 0) std::memcpy(out, lanes, n * sizeof(float));
}
INLINE void store_columns(uint16_t* out, F16 x, int64_t n) {
  if (n >= kLanes) return store_bf16(out, x);
  uint16_t lanes[kLanes];
  store_bf16(lanes, x);
  if (n > 0) std::memcpy(out, lanes, n * sizeof(uint16_t));
}

template <int R, typename Out>
void tile_product(const Matmul& m, int64_t row, int64_t panel) {
  F16 sums[R][2];
  panel_product<R>(m.x + row * m.num_pairs, m.kernel + panel * m.num_pairs * kPanel, m.num_pairs,
                   sums);
  Out* out = static_cast<Out*>(m.out);
  for (int r = 0; r < R; ++r) {
    if (m.swiglu) {  // a panel holds 16 gates and the 16 values that they let through
      const F16 gate = sums[r][0];
      const F16 value = gate / (1.0f + exp16(-gate)) * sums[r][1];
      const int64_t column = panel * kLanes;
      store_columns(out + (row + r) * m.num_columns + column, value, m.num_columns - column);
    } else {
      const int64_t column = panel * kPanel;
      Out* place = out + (row + r) * m.num_columns + column;
      store_columns(place, sums[r][0], m.num_columns - column);
      store_columns(place + kLanes, sums[r][1], m.num_columns - column - kLanes);
    }
  }
}

// Rows [first, last) by panels [first_panel, last_panel).
template <typename Out>
void block_product(const Matmul& m, int64_t first, int64_t last, int64_t first_panel,
                   int64_t last_panel) {
  for (int64_t panel = first_panel; panel < last_panel; ++panel)
    for (int64_t row = first; row < last; row += kTileRows)
      with_rows<kTileRows>(last - row, [&](auto rows) {
        tile_product<decltype(rows)::value, Out>(m, row, panel);
      });
}

void matmul(const Matmul& m, const ParallelFor& parallel_for) {
  const int64_t num_blocks = (m.num_rows + kBlockRows - 1) / kBlockRows;
  // Enough tasks that threads of unequal speed end together, few enough that each has some work.
  const int64_t work = std::min<int64_t>(m.num_rows, kBlockRows) * m.num_pairs;  // of a panel
  const int64_t at_once = std::clamp<int64_t>((1 << 16) / std::max<int64_t>(work, 1), 1, 16);
  const int64_t num_groups = (m.num_panels + at_once - 1) / at_once;
  parallel_for(num_blocks * num_groups, [&](int64_t task) {
    const int64_t first = task / num_groups * kBlockRows, group = task % num_groups * at_once;
    const int64_t last = std::min(first + kBlockRows, m.num_rows);
    const int64_t last_panel = std::min(group + at_once, m.num_panels);
    if (m.is_float) {
      block_product<float>(m, first, last, group, last_panel);
    } else {
      block_product<uint16_t>(m, first, last, group, last_panel);
    }
  });
}
