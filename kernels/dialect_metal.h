// dialect_metal.h: what the kernel bodies need beyond Metal itself. README.md lists the dialect.

#define FM_FN inline
#define FM_THREADGROUP_ARRAY(type, name, count) threadgroup type name[count]

FM_FN float fm_float(uint32_t bits) { return as_type<float>(bits); }

// The bits of word under mask, or-ed into base.
FM_FN uint32_t fm_insert(uint32_t word, uint32_t mask, uint32_t base) { return (word & mask) | base; }
