#define FM_FN inline
#define FM_THREADGROUP_ARRAY(type, name, count) threadgroup type name[count]
FM_FN float fm_float(uint32_t bits) { return as_type<float>(bits); }
FM_FN float fm_field(uint32_t word, uint32_t mask) { return fm_float((word & mask) | 0x4b000000u) - 8388608.0f; }
#define FM_STAGED_EXPONENT 0
#define FM_DOT_SCALE 1.0f

[[kernel]] void custom_kernel_flash_moe_fetch_records_b8a941260b98_uint32_tc_uint32_t_uint32_tc_uint32_tc_uint32_t_uint32_t_floatc_uint32_t(
  const constant uint32_t* ids [[buffer(0)]],
  const device uint32_t* table [[buffer(1)]],
  const constant uint32_t* landing [[buffer(2)]],
  const constant uint32_t* target [[buffer(3)]],
  const device uint32_t* sources [[buffer(4)]],
  const device uint32_t* starts [[buffer(5)]],
  const constant float* after [[buffer(6)]],
  device uint32_t* places [[buffer(7)]],
  uint3 thread_position_in_grid [[thread_position_in_grid]]) {
constexpr int UNITS = 20;
constexpr int RUNS = 2;
constexpr int STRIDE = 160;
constexpr int COUNT = 8;
constexpr int THREADS = 256;
constexpr int NOT_IN_SLOT = 2147483648;
const uint rank = thread_position_in_grid.y;
const uint first = thread_position_in_grid.x;
const uint expert = ids[rank];
const uint slot = table[expert];
const bool absent = slot == NOT_IN_SLOT;
const uint place = absent ? landing[rank] : slot;
if (first == 0) {
  places[rank] = place;
}
if (absent) {
  const size_t base = (size_t(target[1]) << 32) | size_t(target[0]);
  device size_t* record = (device size_t*)(base + size_t(place) * STRIDE);
  size_t low[COUNT];
  size_t high[COUNT];
#pragma unroll
  for (int j = 0; j < COUNT; j++) {
    const uint unit = first + j * THREADS;
    low[j] = 0;
    high[j] = 0;
    if (unit < UNITS) {
      uint run = 0;
#pragma unroll
      for (int later = 1; later < RUNS; later++) {
        run += unit >= starts[later] ? 1 : 0;
      }
      const uint where = (expert * RUNS + run) * 2;
      const size_t source = (size_t(sources[where + 1]) << 32) | size_t(sources[where]);
      const uint shift = uint(source % 8) * 8;
      const device size_t* words = (const device size_t*)(source - source % 8) + (unit - starts[run]);
      low[j] = words[0] >> shift;
      if (shift > 0) {
        high[j] = words[1] << (64 - shift);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < COUNT; j++) {
    const uint unit = first + j * THREADS;
    if (unit < UNITS) {
      record[unit] = low[j] | high[j];
    }
  }
}

}
