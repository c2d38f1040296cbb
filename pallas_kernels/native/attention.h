// Ragged paged attention over a pool of bfloat16, see ragged_paged_attention/api.py. Included once
// for each instruction set.
//
// A task is a tile of query tokens of one sequence and one key head: R rows of queries against
// chunks of kChunk keys with a running softmax. Keys are transposed as pairs of bfloat16, so that
// lanes are keys and no sum crosses lanes; values are widened as they are read.

constexpr int kChunk = 4 * kLanes;     // keys at a time
constexpr int kMaxRows = 48;           // query rows of a tile, unless one token's group has more
constexpr int kRowBlock = 6;           // rows whose sums are in registers at a time
constexpr float kMasked = -1e30f;      // finite: a row of masked positions must not become NaN

struct Tile {
  const Attention& a;
  int64_t sequence, head;       // key head
  int64_t first, num_tokens;    // query tokens of the batch
  int64_t first_position;       // of the first query token in its sequence
  int64_t num_rows;             // num_tokens * group
};

// Buffers of one task; sizes in elements.
struct Scratch {
  std::vector<uint32_t> queries;  // [rows, D / 2]
  std::vector<uint32_t> keys;     // [D / 2 rounded up to 16, kChunk]
  std::vector<float> weights;     // [rows, kChunk]
  std::vector<float> sums;        // [rows, D rounded up to 16]
  std::vector<float> row_max, row_sum;
};

INLINE int64_t round_up(int64_t x, int64_t n) { return (x + n - 1) / n * n; }

// Keys of a chunk as pairs, transposed: keys[pair][key]. All kChunk pointers can be read.
void transpose_keys(const uint16_t* const rows[kChunk], int64_t num_pairs, uint32_t* keys) {
  for (int64_t pair = 0; pair < num_pairs; pair += kLanes) {
    const int64_t n = std::min<int64_t>(num_pairs - pair, kLanes);
    for (int key = 0; key < kChunk; key += kLanes) {
      U16 block[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const uint16_t* source = rows[key + i] + 2 * pair;
        if (n == kLanes) {
          block[i] = load_bits(source);
        } else {
          block[i] = U16{};
          std::memcpy(&block[i], source, n * sizeof(uint32_t));
        }
      }
      transpose(block);
      for (int i = 0; i < kLanes; ++i)
        std::memcpy(keys + (pair + i) * kChunk + key, &block[i], sizeof(U16));
    }
  }
}

// weights[r][key] = queries[r] . keys[:, key] for R rows.
template <int R>
INLINE void products(const uint32_t* queries, const uint32_t* keys, int64_t num_pairs,
                     float* weights) {
  for (int key = 0; key < kChunk; key += 2 * kLanes) {
    F16 s[R][2] = {};
    for (int64_t i = 0; i < num_pairs; ++i) {
      const U16 k0 = load_bits(keys + i * kChunk + key);
      const U16 k1 = load_bits(keys + i * kChunk + key + kLanes);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const U16 q = broadcast_bits(queries[r * num_pairs + i]);
        s[r][0] = dot_pairs(s[r][0], q, k0);
        s[r][1] = dot_pairs(s[r][1], q, k1);
      }
    }
    for (int r = 0; r < R; ++r) {
      store(weights + r * kChunk + key, s[r][0]);
      store(weights + r * kChunk + key + kLanes, s[r][1]);
    }
  }
}

// sums[r] += weights[r] . values for R rows, over n keys.
template <int R>
INLINE void add_values(const float* weights, const uint16_t* const rows[kChunk], int n,
                       int64_t head_dim, int64_t stride, float* sums) {
  for (int64_t d = 0; d < head_dim; d += 2 * kLanes) {
    const bool is_whole = d + 2 * kLanes <= head_dim;
    const int first = std::min<int64_t>(head_dim - d, kLanes);
    const int second = std::min<int64_t>(head_dim - d - first, kLanes);
    F16 s[R][2];
    for (int r = 0; r < R; ++r) {
      s[r][0] = load(sums + r * stride + d);
      s[r][1] = second > 0 ? load(sums + r * stride + d + kLanes) : F16{};
    }
    for (int key = 0; key < n; ++key) {
      const uint16_t* value = rows[key] + d;
      const F16 v0 = is_whole ? load_bf16(value) : load_bf16(value, first);
      const F16 v1 = is_whole ? load_bf16(value + kLanes) : load_bf16(value + first, second);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const F16 w = broadcast(weights[r * kChunk + key]);
        s[r][0] += w * v0;
        s[r][1] += w * v1;
      }
    }
    for (int r = 0; r < R; ++r) {
      store(sums + r * stride + d, s[r][0]);
      if (second > 0) store(sums + r * stride + d + kLanes, s[r][1]);
    }
  }
}

template <int R>
void products_of(const uint32_t* queries, const uint32_t* keys, int64_t num_pairs, float* weights,
                 int64_t num_rows) {
  if constexpr (R > 1) {
    if (num_rows < R)
      return products_of<R - 1>(queries, keys, num_pairs, weights, num_rows);
  }
  products<R>(queries, keys, num_pairs, weights);
}

template <int R>
void add_values_of(const float* weights, const uint16_t* const rows[kChunk], int n,
                   int64_t head_dim, int64_t stride, float* sums, int64_t num_rows) {
  if constexpr (R > 1) {
    if (num_rows < R)
      return add_values_of<R - 1>(weights, rows, n, head_dim, stride, sums, num_rows);
  }
  add_values<R>(weights, rows, n, head_dim, stride, sums);
}

// Products become weights e^(x - max) of the keys that a row sees; what the row has so far is
// brought to the new maximum.
INLINE void soften(const Tile& t, int64_t row, int64_t chunk_start, Scratch& scratch,
                   int64_t stride) {
  const Attention& a = t.a;
  const int64_t position = t.first_position + row / a.group;
  const int64_t oldest = a.window > 0 ? position - a.window + 1 : 0;
  float* weights = scratch.weights.data() + row * kChunk;
  const I16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  F16 x[kChunk / kLanes], best = broadcast(kMasked);
  const float scale = a.scale * a.k_scale[t.head];
  for (int i = 0; i < kChunk / kLanes; ++i) {
    x[i] = load(weights + i * kLanes) * scale;
    if (a.soft_cap > 0) {
      const F16 twice = exp16(x[i] * (2.0f / a.soft_cap));
      x[i] = a.soft_cap * (1.0f - 2.0f / (twice + 1.0f));
    }
    const I16 p = lane + static_cast<int32_t>(chunk_start + i * kLanes);
    const I16 sees = (p <= static_cast<int32_t>(position)) & (p >= static_cast<int32_t>(oldest));
    x[i] = sees ? x[i] : broadcast(kMasked);
    best = max16(best, x[i]);
  }
  const float old_max = scratch.row_max[row], new_max = std::max(old_max, reduce_max(best));
  F16 sum = F16{};
  for (int i = 0; i < kChunk / kLanes; ++i) {
    const F16 w = exp16(x[i] - new_max);
    store(weights + i * kLanes, w);
    sum += w;
  }
  const float kept = std::exp(old_max - new_max);
  scratch.row_max[row] = new_max;
  scratch.row_sum[row] = scratch.row_sum[row] * kept + reduce_sum(sum);
  float* sums = scratch.sums.data() + row * stride;
  for (int64_t d = 0; d < stride; d += kLanes) store(sums + d, load(sums + d) * kept);
}

// Where the keys of a chunk are, their values behind them; behind the end the last one again. The
// memory is fetched meanwhile: blocks lie anywhere, so that the processor could not guess.
void find_keys(const Tile& t, int64_t start, int64_t end, const uint16_t* keys[kChunk]) {
  const Attention& a = t.a;
  const int32_t* table = a.block_tables + t.sequence * a.max_blocks;
  const int64_t n = std::min<int64_t>(end - start, kChunk);
  int64_t block = start / a.block_size, offset = start % a.block_size;
  for (int i = 0; i < kChunk; ++i) {
    if (i >= n) {
      keys[i] = keys[n - 1];
      continue;
    }
    keys[i] = a.place(table[block], offset) + 2 * t.head * a.head_dim;
    for (int64_t d = 0; d < 2 * a.head_dim; d += 32) __builtin_prefetch(keys[i] + d);
    if (++offset == a.block_size) ++block, offset = 0;
  }
}

void attend(const Tile& t, Scratch& s) {
  const Attention& a = t.a;
  const int64_t num_pairs = a.head_dim / 2, stride = round_up(a.head_dim, kLanes);
  s.queries.resize(t.num_rows * num_pairs);
  s.keys.resize(round_up(num_pairs, kLanes) * kChunk);
  s.weights.resize(t.num_rows * kChunk);
  s.sums.assign(t.num_rows * stride, 0.0f);
  s.row_max.assign(t.num_rows, kMasked);
  s.row_sum.assign(t.num_rows, 0.0f);
  for (int64_t r = 0; r < t.num_rows; ++r) {
    const int64_t head = t.head * a.group + r % a.group;
    std::memcpy(s.queries.data() + r * num_pairs,
                a.q + ((t.first + r / a.group) * a.num_heads + head) * a.head_dim,
                a.head_dim * sizeof(uint16_t));
    if (a.sinks) s.row_max[r] = a.sinks[head], s.row_sum[r] = 1.0f;
  }
  const int64_t end = t.first_position + t.num_tokens;  // positions seen by the last query
  const int64_t oldest = a.window > 0 ? std::max<int64_t>(t.first_position - a.window + 1, 0) : 0;
  const int64_t first = oldest / kChunk * kChunk;
  const uint16_t *keys[kChunk], *values[kChunk], *next_keys[kChunk];
  find_keys(t, first, end, next_keys);
  for (int64_t start = first; start < end; start += kChunk) {
    const int n = std::min<int64_t>(end - start, kChunk);
    for (int i = 0; i < kChunk; ++i) {
      keys[i] = next_keys[i];
      values[i] = keys[i] + a.head_dim;
    }
    if (start + kChunk < end) find_keys(t, start + kChunk, end, next_keys);
    transpose_keys(keys, num_pairs, s.keys.data());
    for (int64_t r = 0; r < t.num_rows; r += kRowBlock)
      products_of<kRowBlock>(s.queries.data() + r * num_pairs, s.keys.data(), num_pairs,
                             s.weights.data() + r * kChunk, t.num_rows - r);
    for (int64_t r = 0; r < t.num_rows; ++r) soften(t, r, start, s, stride);
    for (int64_t r = 0; r < t.num_rows; r += kRowBlock)
      add_values_of<kRowBlock>(s.weights.data() + r * kChunk, values, n, a.head_dim, stride,
                               s.sums.data() + r * stride, t.num_rows - r);
  }
  for (int64_t r = 0; r < t.num_rows; ++r) {
    const int64_t head = t.head * a.group + r % a.group;
    uint16_t* out = a.out + ((t.first + r / a.group) * a.num_heads + head) * a.head_dim;
    const float factor = a.v_scale[t.head] / s.row_sum[r];
    for (int64_t d = 0; d < a.head_dim; d += kLanes)
      store_columns(out + d, load(s.sums.data() + r * stride + d) * factor, a.head_dim - d);
  }
}

void attention(const Attention& a, const ParallelFor& parallel_for) {
  const int64_t tile_tokens = std::max<int64_t>(1, kMaxRows / a.group);
  std::vector<std::pair<int64_t, int64_t>> tiles;  // sequence, first query token of the tile
  for (int64_t s = 0; s < a.num_seqs; ++s)
    for (int64_t t = a.query_start[s]; t < a.query_start[s + 1]; t += tile_tokens)
      tiles.emplace_back(s, t);
  // the last tiles of a prompt see most: they come first, so that no thread is left with one
  std::reverse(tiles.begin(), tiles.end());
  parallel_for(tiles.size() * a.num_kv_heads, [&](int64_t task) {
    static thread_local Scratch scratch;
    const auto [s, first] = tiles[task / a.num_kv_heads];
    const int64_t end = a.query_start[s + 1];
    const int64_t num_tokens = std::min(tile_tokens, end - first);
    const int64_t position = a.seq_lens[s] - (end - first);
    attend({a, s, task % a.num_kv_heads, first, num_tokens, position, num_tokens * a.group},
           scratch);
  });
}
