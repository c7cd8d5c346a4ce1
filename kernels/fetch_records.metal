// fetch_records.metal: a token's experts that are in no slot, copied from host memory into slots by the GPU (decode)
// Math     places[k] = table[ids[k]], or landing[k] if that says NOT_IN_SLOT; then the record is copied there
// Inputs   ids, table, landing, target, sources, starts, after
// Outputs  places
// Shapes   ids (1, K) u32, table (E) u32, landing (K) u32: slots to fill, target (2) u32: low and high half of the
//          address of slot 0, sources (E, RUNS, 2) u32: address of each run of an expert's record, starts (8 or more)
//          u32: first unit of each run; a slot is STRIDE bytes long; after: any array that must be computed before
//          slots are overwritten
// Threads  grid (UNITS / COUNT rounded up, K, 1), threadgroup (256, 1, 1): COUNT units of 8 bytes a thread, all loaded
//          before the first is stored, so that many reads of host memory are under way
// Traffic  8 UNITS bytes for each expert that is in no slot
// Fused    slots of all experts, the copies of all that are absent
// Assumes  slots, runs and records in units of 8 bytes; memory that both processor and GPU address. Never launched on
//          Metal, where slots are in the memory that files are read into
// --- body ---
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
      // A file's tensors begin at any byte: a unit is a part of two words, of which the neighbours load one as well.
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
