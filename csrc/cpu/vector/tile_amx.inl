// Products of pairs of bf16 on the tile registers of AMX: a step takes 16 rows of 16 words and 16 words of 16
// columns, the layout that a panel has anyway.
//
// TDPBF16PS adds up the products of the low halves of a step's words and those of the high halves, each in
// the order of the words, then both, then the total to the sum. Other instructions would round elsewhere, so
// a smaller number of rows is a smaller tile: a row's bits do not depend on how rows are grouped.

constexpr int64_t kTmmRows = 16, kTmmWords = 16;

// What LDTILECFG reads.
struct alignas(64) TmmConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// The configuration of this thread's tile registers; shape 0: they are released.
struct TmmState {
  int scopes = 0;
  int64_t shape = 0;
};
thread_local constinit TmmState tmm_state;

// Registers 0-3 hold sums, the lower rows in 2 and 3; 4 and 5 upper and lower rows of the left operand; 6 and
// 7 columns of the right one.
inline void configure_tmm(int64_t upper, int64_t lower, int64_t words) {
  const int64_t shape = (upper << 16) | (lower << 8) | words;
  if (tmm_state.shape == shape) return;
  TmmConfig config;
  const auto set = [&config](int tmm, int64_t rows, int64_t row_words) {
    config.rows[tmm] = static_cast<uint8_t>(rows);
    config.row_bytes[tmm] = static_cast<uint16_t>(4 * row_words);
  };
  for (int tmm = 0; tmm < 4; ++tmm) set(tmm, tmm < 2 ? upper : lower, kTmmWords);
  set(4, upper, words);
  set(5, lower, words);
  set(6, words, kTmmWords);
  set(7, words, kTmmWords);
  // GCC 12 takes it for a read of 8 bytes, and tile loads for none at all.
  __asm__ volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
  tmm_state.shape = shape;
}

// While one is alive on a thread, products leave the tile registers as they configured them: loading a
// configuration takes as long as several steps. The last one releases the registers, without which every
// switch of threads would save them. A product outside of any is its own scope.
class TileScope {
 public:
  TileScope() { ++tmm_state.scopes; }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
  ~TileScope() {
    if (--tmm_state.scopes > 0 || tmm_state.shape == 0) return;
    _tile_release();
    tmm_state.shape = 0;
  }
};

// Sums of 16 * RowTiles rows, or of as many as are configured, and 16 * ColumnTiles columns: at least four
// products in flight where there are columns enough.
template <int RowTiles, int ColumnTiles>
void tmm_product(const Left& a, const uint32_t* b, int64_t width, int64_t words, int64_t steps, float* c,
                 int64_t c_row, bool accumulate) {
  static_assert(RowTiles * ColumnTiles <= 4);
  const uint32_t* left = a.at;
  const uint32_t* const left_end = a.at + steps * words;
  const int64_t left_bytes = 4 * a.row, right_bytes = 4 * width, sum_bytes = 4 * c_row;
  float* const sum1 = c + kTmmRows;
  float* const sum2 = RowTiles == 2 ? c + kTmmRows * c_row : c + 2 * kTmmRows;
  float* const sum3 = sum2 + kTmmRows;
  constexpr bool kUse1 = ColumnTiles > 1, kUse2 = RowTiles == 2 || ColumnTiles > 2,
                 kUse3 = RowTiles * ColumnTiles == 4;
  __asm__ volatile("" : : : "memory");  // tile loads, see above
  if (accumulate) {
    _tile_loadd(0, c, sum_bytes);
    if constexpr (kUse1) _tile_loadd(1, sum1, sum_bytes);
    if constexpr (kUse2) _tile_loadd(2, sum2, sum_bytes);
    if constexpr (kUse3) _tile_loadd(3, sum3, sum_bytes);
  } else {
    _tile_zero(0);
    if constexpr (kUse1) _tile_zero(1);
    if constexpr (kUse2) _tile_zero(2);
    if constexpr (kUse3) _tile_zero(3);
  }
  for (; left != left_end; left += words, b += words * width) {
    _tile_loadd(4, left, left_bytes);
    _tile_loadd(6, b, right_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (RowTiles == 2) {
      _tile_loadd(5, left + kTmmRows * a.row, left_bytes);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (ColumnTiles > 1) {
      _tile_loadd(7, b + kTmmRows, right_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (RowTiles == 2 && ColumnTiles == 2) _tile_dpbf16ps(3, 5, 7);
    if constexpr (ColumnTiles > 2) {
      _tile_loadd(6, b + 2 * kTmmRows, right_bytes);
      _tile_dpbf16ps(2, 4, 6);
    }
    if constexpr (ColumnTiles > 3) {
      _tile_loadd(7, b + 3 * kTmmRows, right_bytes);
      _tile_dpbf16ps(3, 4, 7);
    }
  }
  _tile_stored(0, c, sum_bytes);
  if constexpr (kUse1) _tile_stored(1, sum1, sum_bytes);
  if constexpr (kUse2) _tile_stored(2, sum2, sum_bytes);
  if constexpr (kUse3) _tile_stored(3, sum3, sum_bytes);
}

// `steps` steps of `words` words each.
inline void multiply_steps(Left a, int64_t rows, const uint32_t* b, int64_t width, int64_t words,
                           int64_t steps, float* c, int64_t c_row, bool accumulate) {
  for (; rows > 0; rows -= 2 * kTmmRows) {
    const bool two = rows > kTmmRows;
    const int64_t upper = two ? kTmmRows : rows;
    const int64_t lower = !two ? upper : rows < 2 * kTmmRows ? rows - kTmmRows : kTmmRows;
    configure_tmm(upper, lower, words);
    const int64_t most = two ? 2 * kTmmRows : 4 * kTmmRows;
    for (int64_t column = 0; column < width; column += most) {
      const int64_t tiles = (width - column < most ? width - column : most) / kTmmRows;
      const auto product = two          ? (tiles == 2 ? tmm_product<2, 2> : tmm_product<2, 1>)
                           : tiles == 4 ? tmm_product<1, 4>
                           : tiles == 3 ? tmm_product<1, 3>
                           : tiles == 2 ? tmm_product<1, 2>
                                        : tmm_product<1, 1>;
      product(a, b + column, width, words, steps, c + column, c_row, accumulate);
    }
    a.at += 2 * kTmmRows * a.row;
    c += 2 * kTmmRows * c_row;
  }
}

// multiply() of tile.inl for rows whose words lie side by side (a.step == 1).
inline void multiply_tmm(const Left& a, int64_t rows, const uint32_t* b, int64_t width, int64_t words,
                         float* c, int64_t c_row, bool accumulate) {
  const TileScope scope;
  const int64_t steps = words / kTmmWords, whole = steps * kTmmWords, rest = words - whole;
  if (steps > 0) multiply_steps(a, rows, b, width, kTmmWords, steps, c, c_row, accumulate);
  if (rest > 0)
    multiply_steps({a.at + whole, a.row, 1}, rows, b + whole * width, width, rest, 1, c, c_row,
                   accumulate || steps > 0);
}
