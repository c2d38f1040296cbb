// Products of bfloat16 rows with packed kernels, see pallas_kernels/packed_matmul/layout.py. Included
// once for each instruction set.

constexpr int kPanel = 32;             // columns of a panel
constexpr int kGates = kPanel / 2;     // of a gated panel, then as many values that they let through
constexpr int kTileRows = kSums / 2;   // rows whose sums, of two vectors, are in registers
constexpr int64_t kBlockRows = 96;     // rows that a panel meets before the next one is read, at least

// A product of few rows waits for its kernel, so it fetches so many words ahead: processors fetch along
// by themselves, but not that far.
constexpr int kFewRows = 4, kFetchAhead = 512;

template <int V>
INLINE void fetch(const uint32_t* words) {
  for (int word = 0; word < V * kLanes; word += 16) __builtin_prefetch(words + word);
}

// sums[r] = row r of x [R, num_pairs] times one panel [num_pairs, kPanel].
template <int R>
INLINE void panel_product(const Element* x, const uint32_t* panel, int64_t num_pairs,
                          float sums[R][kPanel]) {
  constexpr int V = vectors_at_once(R, kPanel / kLanes);
  const int64_t width = num_pairs * kPerPair;
  for (int column = 0; column < kPanel; column += V * kLanes) {
    F s[R][V] = {};
    for (int64_t i = 0; i < num_pairs; ++i) {
      const uint32_t* pairs = panel + i * kPanel + column;
      if (R <= kFewRows) fetch<V>(pairs + kFetchAhead);
#pragma GCC unroll 2
      for (int e = 0; e < kPerPair; ++e) {
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
          const auto a = broadcast(x[r * width + i * kPerPair + e]);
#pragma GCC unroll 8
          for (int v = 0; v < V; ++v)
            s[r][v] = dot(s[r][v], a, part(load(pairs + v * kLanes), e));
        }
      }
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) store(sums[r] + column + v * kLanes, s[r][v]);
  }
}

// Writes what num_rows rows from a certain one on have of one panel.
template <typename Out>
INLINE void write_sums(const Matmul& m, const float (*sums)[kPanel], int64_t num_rows, int64_t row,
                       int64_t panel) {
  const int64_t first = panel * (m.swiglu ? kGates : kPanel), left = m.num_columns - first;
  Out* out = static_cast<Out*>(m.out) + row * m.num_columns + first;
  for (int64_t r = 0; r < num_rows; ++r, out += m.num_columns) {
    for (int column = 0; column < (m.swiglu ? kGates : kPanel); column += kLanes) {
      F value = load(sums[r] + column);
      if (m.swiglu) value = value / (1.0f + exp(-value)) * load(sums[r] + kGates + column);
      store_columns(out + column, value, left - column);
    }
  }
}

#ifdef JAXLLM_TILES
#include "tiles.h"
#endif

// Rows [first, last) of x as elements [num_rows, width] by panels [first_panel, last_panel).
template <typename Out>
void block_product(const Matmul& m, const Element* x, int64_t first, int64_t last,
                   int64_t first_panel, int64_t last_panel) {
#ifdef JAXLLM_TILES
  if (tiled_block_product<Out>(m, x, first, last, first_panel, last_panel)) return;
#endif
  for (int64_t panel = first_panel; panel < last_panel; ++panel)
    for (int64_t row = first; row < last; row += kTileRows)
      with_rows<kTileRows>(last - row, [&](auto rows) {
        constexpr int R = decltype(rows)::value;
        float sums[R][kPanel];
        panel_product<R>(x + row * m.num_pairs * kPerPair, m.kernel + panel * m.num_pairs * kPanel,
                         m.num_pairs, sums);
        write_sums<Out>(m, sums, R, row, panel);
      });
}

// The rows of x as a product reads them; the caller's thread keeps the memory.
const Element* rows_as_elements(const Matmul& m, const ParallelFor& parallel_for) {
#ifdef JAXLLM_DOT_BF16
  return m.x;
#else
  static thread_local std::vector<Element> rows;
  rows.resize(m.num_rows * m.num_pairs * kPerPair);
  Element* elements = rows.data();  // a thread that helps has a vector of its own
  parallel_for((m.num_rows + kBlockRows - 1) / kBlockRows, [&m, elements](int64_t block) {
    const int64_t first = block * kBlockRows * m.num_pairs;
    const int64_t n = std::min(kBlockRows * m.num_pairs, m.num_rows * m.num_pairs - first);
    to_elements(m.x + first, n, elements + first * kPerPair);
  });
  return elements;
#endif
}

void matmul(const Matmul& m, const ParallelFor& parallel_for) {
#ifdef JAXLLM_TILES
  const int64_t block_rows = std::max(kTiledBlockBytes / (m.num_pairs * 4) / 32 * 32, kBlockRows);
#else
  const int64_t block_rows = kBlockRows;
#endif
  const int64_t num_blocks = (m.num_rows + block_rows - 1) / block_rows;
  // Enough tasks that threads of unequal speed end together, few enough that each has some work.
  const int64_t work = std::min(m.num_rows, block_rows) * m.num_pairs;  // of a panel
  const int64_t most = std::max<int64_t>(1, 1024 / std::max<int64_t>(m.num_pairs, 1));  // 128 KB
  const int64_t at_once = std::clamp<int64_t>((1 << 16) / std::max<int64_t>(work, 1), 1, most);
  const int64_t num_groups = (m.num_panels + at_once - 1) / at_once;
  const Element* x = rows_as_elements(m, parallel_for);
  parallel_for(num_blocks * num_groups, [&](int64_t task) {
    const int64_t first = task / num_groups * block_rows, group = task % num_groups * at_once;
    const int64_t last = std::min(first + block_rows, m.num_rows);
    const int64_t last_panel = std::min(group + at_once, m.num_panels);
    if (m.is_float) {
      block_product<float>(m, x, first, last, group, last_panel);
    } else {
      block_product<uint16_t>(m, x, first, last, group, last_panel);
    }
  });
}
