// Products of many rows by the processor's matrix unit (AMX), where there is one. A tile is 16 rows
// of 64 bytes: of x 16 rows of 16 pairs, of a panel 16 pairs of 16 columns, of sums 16 rows of 16
// columns.

constexpr int64_t kTile = 16;
constexpr int64_t kTiledRows = 2 * kTile;  // rows whose sums are in tiles at a time
constexpr int64_t kFewestTiledRows = 4;    // fewer are as fast without
constexpr int64_t kTiledBlockBytes = 1 << 20;  // of x, in the cache while panels meet it

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Sums are tiles 0 to 3 (of the first rows 0 and 1), x 4 and 5, the panel 6 and 7.
INLINE void configure_tiles(int64_t num_rows) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) config.row_bytes[tile] = 64;
  const uint8_t first = std::min(num_rows, kTile), second = num_rows - first;
  config.rows[0] = config.rows[1] = config.rows[4] = first;
  config.rows[2] = config.rows[3] = config.rows[5] = second;
  config.rows[6] = config.rows[7] = kTile;
  if (!second)
    for (int tile : {2, 3, 5}) config.row_bytes[tile] = 0;
  _tile_loadconfig(&config);
}

// What a pass over a panel fetches meanwhile: in each step so many lines, from words on.
struct Ahead {
  const uint32_t* words;
  int lines;
};
constexpr int kStepWords = kTile * kPanel, kStepLines = kStepWords / 16;

// sums[r] = row r of x [num_rows, num_pairs] times one panel [num_pairs, kPanel]; so many rows as are
// configured.
template <bool has_second>
INLINE void tiled_product(const Element* x, const uint32_t* panel, int64_t num_pairs, Ahead ahead,
                          float (*sums)[kPanel]) {
  const int64_t x_stride = num_pairs * 4, panel_stride = kPanel * 4;
  _tile_zero(0);
  _tile_zero(1);
  if (has_second) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t i = 0; i < num_pairs; i += kTile) {
    const uint32_t* words = ahead.words + i * kPanel;
    for (int line = 0; line < ahead.lines; ++line) __builtin_prefetch(words + line * 16, 0, 2);
    _tile_loadd(6, panel + i * kPanel, panel_stride);
    _tile_loadd(4, x + i, x_stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, panel + i * kPanel + kTile, panel_stride);
    _tile_dpbf16ps(1, 4, 7);
    if (has_second) {
      _tile_loadd(5, x + kTile * num_pairs + i, x_stride);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums[0], panel_stride);
  _tile_stored(1, sums[0] + kTile, panel_stride);
  if (has_second) {
    _tile_stored(2, sums[kTile], panel_stride);
    _tile_stored(3, sums[kTile] + kTile, panel_stride);
  }
}

// As block_product, if the rows are many and fill the tiles' width. Returns whether.
//
// Memory is slower than the tiles, so it must never wait: the first pass over the first panel
// fetches that one, and all the others together the next panel.
template <typename Out>
bool tiled_block_product(const Matmul& m, const Element* x, int64_t first, int64_t last,
                         int64_t first_panel, int64_t last_panel) {
  if (last - first < kFewestTiledRows || m.num_pairs % kTile) return false;
  const int64_t num_passes = (last - first + kTiledRows - 1) / kTiledRows;
  const int64_t share = (kStepLines + num_passes - 1) / num_passes;  // of a step's lines
  float sums[kTiledRows][kPanel];
  int64_t configured = 0;
  for (int64_t panel = first_panel; panel < last_panel; ++panel) {
    const uint32_t* kernel = m.kernel + panel * m.num_pairs * kPanel;
    const uint32_t* next = kernel + m.num_pairs * kPanel;
    for (int64_t pass = 0; pass < num_passes; ++pass) {
      const int64_t row = first + pass * kTiledRows, num_rows = std::min(last - row, kTiledRows);
      if (num_rows != configured) configure_tiles(configured = num_rows);
      const int64_t done = pass * share, lines = std::clamp<int64_t>(kStepLines - done, 0, share);
      Ahead ahead = {next + done * 16, panel + 1 < last_panel ? static_cast<int>(lines) : 0};
      if (panel == first_panel && pass == 0) ahead = {kernel + kFetchAhead, kStepLines};
      const Element* rows = x + row * m.num_pairs;
      if (num_rows > kTile) {
        tiled_product<true>(rows, kernel, m.num_pairs, ahead, sums);
      } else {
        tiled_product<false>(rows, kernel, m.num_pairs, ahead, sums);
      }
      write_sums<Out>(m, sums, num_rows, row, panel);
    }
  }
  _tile_release();
  return true;
}
