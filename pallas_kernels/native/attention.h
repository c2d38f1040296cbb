// Ragged paged attention over a pool of bfloat16, see ragged_paged_attention/api.py. Included once
// for each instruction set.
//
// A task is a tile of query tokens of one sequence and some key heads: for each head, R rows of
// queries against chunks of kChunk keys with a running softmax. Keys are transposed, so that lanes are
// keys and no sum crosses lanes; values are widened as they are read.

constexpr int kChunk = 64;             // keys at a time
constexpr int kMaxRows = 48;           // query rows of a tile, unless one token's group has more
constexpr int kRowBlock = 6;           // rows whose sums are in registers at a time
constexpr int64_t kManyTiles = 16;     // of which each has all heads
constexpr int64_t kTilesOfTask = 4;    // at most; what the next one reads is fetched meanwhile
constexpr float kMasked = -1e30f;      // finite: a row of masked positions must not become NaN

struct Tile {
  const Attention& a;
  int64_t sequence;
  int64_t first_head, num_heads;  // key heads
  int64_t first, num_tokens;    // query tokens of the batch
  int64_t first_position;       // of the first query token in its sequence
  int64_t num_rows;             // num_tokens * group, of one key head

  int64_t end() const { return first_position + num_tokens; }  // positions seen by the last token
  int64_t begin() const {
    return a.window > 0 ? std::max<int64_t>(first_position - a.window + 1, 0) : 0;
  }
  int64_t key_head(int64_t row) const { return first_head + row / num_rows; }
  int64_t head(int64_t row) const { return key_head(row) * a.group + row % num_rows % a.group; }
  // Of a row's head in q and out.
  int64_t offset(int64_t row) const {
    return ((first + row % num_rows / a.group) * a.num_heads + head(row)) * a.head_dim;
  }
};

// Buffers of one task; sizes in elements. Rows are those of the first head, then of the next.
struct Scratch {
  std::vector<Element> queries;   // [rows, D / 2 * kPerPair]
  std::vector<Element> keys;      // [D / 2 rounded up to kLanes, kPerPair, kChunk], of one head
  std::vector<float> weights;     // [rows of a head, kChunk]
  std::vector<float> sums;        // [rows, D rounded up to kLanes]
  std::vector<float> row_max, row_sum;
};

// Where the keys of a chunk are.
struct Chunk {
  const uint16_t* tokens[kChunk];  // all heads of a token; behind the last one that one again
  int64_t start;
  int n;
};

INLINE int64_t round_up(int64_t x, int64_t n) { return (x + n - 1) / n * n; }

// Keys of a chunk, transposed: keys[element][key]. offset: of the head in a token.
void transpose_keys(const Chunk& chunk, const Chunk* next, int64_t offset, int64_t num_pairs,
                    Element* keys) {
  for (int64_t pair = 0; pair < num_pairs; pair += kLanes) {
    const int64_t n = std::min<int64_t>(num_pairs - pair, kLanes);
    for (int key = 0; key < kChunk; key += kLanes) {
      U block[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const uint16_t* source = chunk.tokens[key + i] + offset + 2 * pair;
        if (next) __builtin_prefetch(next->tokens[key + i] + offset + 2 * pair);
        if (n == kLanes) {
          block[i] = load_bits(source);
        } else {
          block[i] = U{};
          std::memcpy(&block[i], source, n * sizeof(uint32_t));
        }
      }
      transpose(block);
      for (int i = 0; i < kLanes; ++i)
        for (int e = 0; e < kPerPair; ++e)
          store(keys + ((pair + i) * kPerPair + e) * kChunk + key, part(block[i], e));
    }
  }
}

// weights[r][key] = queries[r] . keys[:, key] for R rows of so many elements.
template <int R>
void products(const Element* queries, const Element* keys, int64_t width, float* weights) {
  constexpr int V = vectors_at_once(R, kChunk / kLanes);
  for (int key = 0; key < kChunk; key += V * kLanes) {
    F s[R][V] = {};
    for (int64_t i = 0; i < width; ++i) {
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const auto q = broadcast(queries[r * width + i]);
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v)
          s[r][v] = dot(s[r][v], q, load(keys + i * kChunk + key + v * kLanes));
      }
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) store(weights + r * kChunk + key + v * kLanes, s[r][v]);
  }
}

// sums[r] += weights[r] . values for R rows, over the keys of a chunk. Meanwhile the same head's keys
// and values of the next chunk are fetched, a line with each line that is read: blocks lie anywhere,
// so that the processor could not guess, and all at once would hold it up.
template <int R>
void add_values(const float* weights, const Chunk& chunk, const Chunk* next, int64_t offset,
                int64_t head_dim, int64_t stride, float* sums) {
  constexpr int V = vectors_at_once(R, 32 / kLanes);  // 32 elements are a line
  for (int64_t d = 0; d < head_dim; d += V * kLanes) {
    const int64_t left = head_dim - d;
    F s[R][V];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v)
        s[r][v] = v * kLanes < left ? load(sums + r * stride + d + v * kLanes) : F{};
    for (int key = 0; key < chunk.n; ++key) {
      const uint16_t* value = chunk.tokens[key] + offset + d;
      if (next) __builtin_prefetch(next->tokens[key] + offset + d);
      F x[V];
      for (int v = 0; v < V; ++v) x[v] = load_bf16(value + v * kLanes, left - v * kLanes);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const F w = broadcast(weights[r * kChunk + key]);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) s[r][v] += w * x[v];
      }
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v)
        if (v * kLanes < left) store(sums + r * stride + d + v * kLanes, s[r][v]);
  }
}

// Products become weights e^(x - max) of the keys that a row sees; what the row has so far, in sums,
// is brought to the new maximum. row: of the head.
INLINE void soften(const Tile& t, int64_t row, int64_t chunk_start, float scale, float* weights,
                   float& row_max, float& row_sum, float* sums, int64_t stride) {
  const Attention& a = t.a;
  const int64_t position = t.first_position + row / a.group;
  const int64_t oldest = a.window > 0 ? position - a.window + 1 : 0;
  const I lane = lane_numbers(std::make_integer_sequence<int, kLanes>{});
  F x[kChunk / kLanes], best = broadcast(kMasked);
  for (int i = 0; i < kChunk / kLanes; ++i) {
    x[i] = load(weights + i * kLanes) * scale;
    if (a.soft_cap > 0) {
      const F twice = exp(x[i] * (2.0f / a.soft_cap));
      x[i] = a.soft_cap * (1.0f - 2.0f / (twice + 1.0f));
    }
    const I p = lane + static_cast<int32_t>(chunk_start + i * kLanes);
    const I sees = (p <= static_cast<int32_t>(position)) & (p >= static_cast<int32_t>(oldest));
    x[i] = sees ? x[i] : broadcast(kMasked);
    best = max(best, x[i]);
  }
  const float new_max = std::max(row_max, reduce_max(best));
  F sum = F{};
  for (int i = 0; i < kChunk / kLanes; ++i) {
    const F w = exp(x[i] - new_max);
    store(weights + i * kLanes, w);
    sum += w;
  }
  const float kept = std::exp(row_max - new_max);
  row_max = new_max;
  row_sum = row_sum * kept + reduce_sum(sum);
  for (int64_t d = 0; d < stride; d += kLanes) store(sums + d, load(sums + d) * kept);
}

// The chunk of the keys from start on, a multiple of kChunk.
void find_chunk(const Tile& t, int64_t start, Chunk& chunk) {
  const Attention& a = t.a;
  const int32_t* table = a.block_tables + t.sequence * a.max_blocks;
  chunk.start = start;
  chunk.n = std::min<int64_t>(t.end() - start, kChunk);
  int64_t block = start / a.block_size, offset = start % a.block_size;
  for (int i = 0; i < chunk.n; ++i) {
    chunk.tokens[i] = a.place(table[block], offset);
    if (++offset == a.block_size) ++block, offset = 0;
  }
  for (int i = chunk.n; i < kChunk; ++i) chunk.tokens[i] = chunk.tokens[chunk.n - 1];
}

INLINE void start_rows(const Tile& t, int64_t num_pairs, int64_t stride, Scratch& s) {
  const Attention& a = t.a;
  const int64_t all_rows = t.num_heads * t.num_rows;
  s.queries.resize(all_rows * num_pairs * kPerPair);
  s.keys.resize(round_up(num_pairs, kLanes) * kPerPair * kChunk);
  s.weights.resize(t.num_rows * kChunk);
  s.sums.assign(all_rows * stride, 0.0f);
  s.row_max.assign(all_rows, kMasked);
  s.row_sum.assign(all_rows, 0.0f);
  for (int64_t row = 0; row < all_rows; ++row) {
    to_elements(a.q + t.offset(row), num_pairs, s.queries.data() + row * num_pairs * kPerPair);
    if (a.sinks) s.row_max[row] = a.sinks[t.head(row)], s.row_sum[row] = 1.0f;
  }
}

INLINE void attend_chunk(const Tile& t, const Chunk& chunk, const Chunk* next, int64_t num_pairs,
                         int64_t stride, Scratch& s) {
  const Attention& a = t.a;
  for (int64_t h = 0; h < t.num_heads; ++h) {
    const int64_t head = t.first_head + h, offset = 2 * head * a.head_dim;
    const int64_t first_row = h * t.num_rows;
    const float scale = a.scale * a.k_scale[head];
    const int64_t width = num_pairs * kPerPair;
    const Element* queries = s.queries.data() + first_row * width;
    float* sums = s.sums.data() + first_row * stride;
    transpose_keys(chunk, next, offset, num_pairs, s.keys.data());
    for (int64_t r = 0; r < t.num_rows; r += kRowBlock)
      with_rows<kRowBlock>(t.num_rows - r, [&](auto rows) {
        products<decltype(rows)::value>(queries + r * width, s.keys.data(), width,
                                        s.weights.data() + r * kChunk);
      });
    for (int64_t r = 0; r < t.num_rows; ++r)
      soften(t, r, chunk.start, scale, s.weights.data() + r * kChunk, s.row_max[first_row + r],
             s.row_sum[first_row + r], sums + r * stride, stride);
    for (int64_t r = 0; r < t.num_rows; r += kRowBlock)
      with_rows<kRowBlock>(t.num_rows - r, [&](auto rows) {
        add_values<decltype(rows)::value>(s.weights.data() + r * kChunk, chunk,
                                          r == 0 ? next : nullptr, offset + a.head_dim, a.head_dim,
                                          stride, sums + r * stride);
      });
  }
}

void find_first_chunk(const Tile& t, Chunk& chunk) {
  find_chunk(t, t.begin() / kChunk * kChunk, chunk);
}

// next: the tile's first chunk; becomes that of the following tile, if there is one.
void attend(const Tile& t, const Tile* following, Chunk& next, Scratch& s) {
  const Attention& a = t.a;
  const int64_t num_pairs = a.head_dim / 2, stride = round_up(a.head_dim, kLanes);
  start_rows(t, num_pairs, stride, s);
  bool is_last;
  do {
    const Chunk chunk = next;
    is_last = chunk.start + kChunk >= t.end();
    if (!is_last) {
      find_chunk(t, chunk.start + kChunk, next);
    } else if (following) {
      find_first_chunk(*following, next);
    }
    attend_chunk(t, chunk, is_last && !following ? nullptr : &next, num_pairs, stride, s);
  } while (!is_last);
  for (int64_t row = 0; row < t.num_heads * t.num_rows; ++row) {
    uint16_t* out = a.out + t.offset(row);
    const float factor = a.v_scale[t.key_head(row)] / s.row_sum[row];
    for (int64_t d = 0; d < a.head_dim; d += kLanes)
      store_columns(out + d, load(s.sums.data() + row * stride + d) * factor, a.head_dim - d);
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
  // All heads of a token lie together, so one task reads them where there are tiles enough.
  const bool is_shared = static_cast<int64_t>(tiles.size()) < kManyTiles;
  const int64_t heads = is_shared ? 1 : a.num_kv_heads, groups = a.num_kv_heads / heads;
  const int64_t num_tiles = tiles.size();
  const auto tile_at = [&](int64_t index, int64_t first_head) {
    const auto [s, first] = tiles[index];
    const int64_t left = a.query_start[s + 1] - first, n = std::min(tile_tokens, left);
    return Tile{a, s, first_head, heads, first, n, a.seq_lens[s] - left, n * a.group};
  };
  const int64_t of_task =
      std::clamp<int64_t>(num_tiles / (4 * parallel_for.num_threads), 1, kTilesOfTask);
  const int64_t num_tasks = (num_tiles + of_task - 1) / of_task;
  parallel_for(num_tasks * groups, [&](int64_t task) {
    static thread_local Scratch scratch;
    const int64_t first_head = task % groups * heads, first = task / groups * of_task;
    const int64_t last = std::min(first + of_task, num_tiles);
    Chunk next;
    find_first_chunk(tile_at(first, first_head), next);
    for (int64_t i = first; i < last; ++i) {
      const Tile following = tile_at(std::min(i + 1, last - 1), first_head);
      attend(tile_at(i, first_head), i + 1 < last ? &following : nullptr, next, scratch);
    }
  });
}
