// dialect_metal.h: what the kernel bodies need beyond Metal itself. README.md lists the dialect.

#define FM_FN inline
#define FM_THREADGROUP_ARRAY(type, name, count) threadgroup type name[count]

FM_FN float fm_float(uint32_t bits) { return as_type<float>(bits); }

// The bits of word under mask, an integer below 2^23, as a float: or-ed into the bits of 2^23 they are the float
// 2^23 + q exactly, and subtracting 2^23 leaves q.
FM_FN float fm_field(uint32_t word, uint32_t mask) { return fm_float((word & mask) | 0x4b000000u) - 8388608.0f; }
#define FM_STAGED_EXPONENT 0
#define FM_DOT_SCALE 1.0f
