/* Tables of the alias method and their place in a file, and the portable coder.

   rANS: Duda 2013, arXiv:1311.2540; interleaved lanes and alias tables: Giesen 2014, arXiv:1402.3392.  States are
   32 bits, slots 16 bits, so that a state is two 16-bit words and vectors need no wider arithmetic. */
#include "rans.h"

int best_level(void) {
#if defined(SMELT_X86)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2"))
        return AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2")) return SIMD;
    return PORTABLE;
#elif defined(SMELT_NEON)
    return SIMD;
#else
    return PORTABLE;
#endif
}

SMELT_API int smelt_best_level(void) { return best_level(); }

/* ---- frequencies and tables */

void rans_normalise(const u32 *counts, int entries, int precision, u32 *freq) {
    const int whole = 1 << precision;
    u64 total = 0;
    int sum = 0, used = 0;
    for (int i = 0; i < entries; i++) total += counts[i];
    for (int i = 0; i < entries; i++) {
        freq[i] = 0;
        if (!counts[i]) continue;
        u64 exact = (2 * (u64)counts[i] * (u64)whole + total) / (2 * total);
        freq[i] = (u32)(exact < 1 ? 1 : exact > (u64)whole - 1 ? (u64)whole - 1 : exact);
        sum += (int)freq[i], used++;
    }
    for (int i = 0; i < entries && used < 2; i++)
        if (!freq[i]) freq[i] = 1, sum++, used++;
    /* One unit at a time from or to where it costs least: count * log2 of the ratio, to first order. */
    while (sum != whole) {
        int step = sum < whole ? 1 : -1, best = -1;
        double least = 0;
        for (int i = 0; i < entries; i++) {
            if (!freq[i] || (step < 0 && freq[i] == 1) || (step > 0 && freq[i] == (u32)whole - 1)) continue;
            double cost = -step * (double)counts[i] / ((double)freq[i] + 0.5 * step);
            if (best < 0 || cost < least) best = i, least = cost;
        }
        freq[best] = (u32)((int)freq[best] + step), sum += step;
    }
}

void rans_build(const rans_plan *plan, int number, rans_table *table, rans_coder *coder) {
    const int k = plan->buckets, width = 65536 / k, shift = 16 - plan->precision;
    int below[256], rest[256], small[256], large[256], smalls = 0, larges = 0;
    u8 other[256];
    int offset[256];
    u32 freq[256] = {0};
    for (int i = 0; i < plan->entries; i++) freq[i] = plan->freq[number][i] << shift;
    for (int i = 0; i < k; i++) {
        rest[i] = (int)freq[i], below[i] = width, other[i] = (u8)i;
        if (rest[i] < width) small[smalls++] = i;
        else large[larges++] = i;
    }
    while (smalls && larges) {
        int s = small[--smalls], l = large[larges - 1];
        below[s] = rest[s], other[s] = (u8)l;
        rest[l] -= width - rest[s];
        if (rest[l] < width) larges--, small[smalls++] = l;
    }
    for (int i = 0; i < k; i++) offset[i] = below[i];
    if (coder) {
        u32 start = 0;
        for (int i = 0; i < 256; i++) {
            coder->freq[i] = freq[i], coder->start[i] = start, start += freq[i] >> shift;
            coder->inverse[i] = freq[i] ? (1.0f - 0x1p-22f) / (float)freq[i] : 0.0f; /* rounding thrice adds less */
        }
    }
    for (int b = 0; b < k; b++) {
        const int o = other[b], own = below[b];
        if (coder) {
            for (int p = 0; p < own; p += 1 << shift) coder->map[coder->start[b] + (u32)(p >> shift)] = (u16)(p * k + b);
            for (int p = own; p < width; p += 1 << shift)
                coder->map[coder->start[o] + (u32)((offset[o] + p - own) >> shift)] = (u16)(p * k + b);
        }
        if (table) {
            const int edge = own < width ? own : width - 1; /* a whole bucket: its last position is its own as well */
            table->from[b] = (u16)(edge * k + b);
            table->bias[b] = (u16)(own < width ? offset[o] - own : 0);
            table->own_freq[b] = (u16)freq[b], table->other_freq[b] = (u16)freq[o];
            table->own_value[b] = plan->values[b], table->other_value[b] = plan->values[o];
        }
        offset[o] += width - own;
    }
    if (table) table->buckets = k;
}

/* ---- bits, from the highest of each byte down */

typedef struct {
    u8 *out;
    size_t cap, bit;
} bit_writer;

static int put_bits(bit_writer *w, u32 value, int bits) {
    for (int i = bits - 1; i >= 0; i--, w->bit++) {
        size_t byte = w->bit >> 3;
        if (byte >= w->cap) return 0;
        if (!(w->bit & 7)) w->out[byte] = 0;
        w->out[byte] |= (u8)((value >> i & 1) << (7 - (w->bit & 7)));
    }
    return 1;
}

typedef struct {
    const u8 *in;
    size_t size, bit;
} bit_reader;

static int get_bit(bit_reader *r) {
    if (r->bit >> 3 >= r->size) return -1;
    int bit = r->in[r->bit >> 3] >> (7 - (r->bit & 7)) & 1;
    r->bit++;
    return bit;
}

static int class_bits(int tables) { return tables < 2 ? 0 : tables == 2 ? 1 : tables <= 4 ? 2 : 3; }

int64_t rans_write_head(const rans_plan *plan, const u8 *classes, size_t blocks, u8 *out, size_t cap) {
    const int values = plan->entries - (plan->escape >= 0);
    if (cap < 5 + (size_t)values) return NO_ROOM;
    size_t n = 0;
    const int k = plan->buckets == 16 ? 0 : plan->buckets == 32 ? 1 : 2;
    out[n++] = (u8)(16 | k | (plan->escape >= 0) << 2 | (plan->tables > 1) << 3);
    out[n++] = (u8)(log2_of((u32)plan->lanes) | plan->listed << 3 | plan->precision << 4);
    out[n++] = (u8)(plan->entries - 1);
    if (plan->listed)
        for (int i = 0; i < values; i++) out[n++] = plan->values[i];
    else
        out[n++] = plan->values[0];
    if (plan->tables > 1) out[n++] = (u8)(plan->tables - 1);
    bit_writer w = {out + n, cap - n, 0};
    for (int t = 0; t < plan->tables; t++)
        for (int i = 0; i < plan->entries - 1; i++) {
            u32 v = plan->freq[t][i] + 1;
            int bits = log2_of(v);
            if (!put_bits(&w, 0, bits) || !put_bits(&w, v, bits + 1)) return NO_ROOM;
        }
    if (plan->tables > 1)
        for (size_t b = 0; b < blocks; b++)
            if (!put_bits(&w, classes[b], class_bits(plan->tables))) return NO_ROOM;
    return (int64_t)(n + (w.bit + 7) / 8);
}

int64_t rans_read_head(rans_plan *plan, u8 *classes, size_t blocks, const u8 *in, size_t size) {
    if (size < 4 || in[0] >> 4 != 1 || (in[0] & 3) == 3) return DAMAGED;
    const int escapes = in[0] >> 2 & 1, several = in[0] >> 3;
    plan->buckets = (in[0] & 3) == 0 ? 16 : (in[0] & 3) == 1 ? 32 : 256;
    plan->lanes = 1 << (in[1] & 7), plan->listed = in[1] >> 3 & 1, plan->precision = in[1] >> 4;
    plan->entries = in[2] + 1, plan->escape = escapes ? plan->entries - 1 : -1;
    const int values = plan->entries - escapes;
    size_t n = 3;
    if (plan->precision < 8 || plan->precision > 14 || plan->entries < 2 || plan->entries > plan->buckets)
        return DAMAGED;
    if (size < n + 2 + (size_t)(plan->listed ? values : 1)) return DAMAGED;
    memset(plan->values, 0, sizeof plan->values);
    if (!plan->listed && in[n] + values > 256) return DAMAGED;
    for (int i = 0; i < values; i++) plan->values[i] = plan->listed ? in[n + (size_t)i] : (u8)(in[n] + i);
    n += plan->listed ? (size_t)values : 1;
    plan->tables = 1;
    if (several & 1) {
        plan->tables = in[n++] + 1;
        if (plan->tables < 2 || plan->tables > MAX_TABLES) return DAMAGED;
    }
    bit_reader r = {in + n, size - n, 0};
    const u32 whole = 1u << plan->precision;
    for (int t = 0; t < plan->tables; t++) {
        u32 sum = 0;
        for (int i = 0; i < plan->entries - 1; i++) {
            int zeros = 0, bit;
            while (!(bit = get_bit(&r)) && zeros < 15) zeros++;
            u32 v = 1;
            if (bit != 1) return DAMAGED;
            for (; zeros; zeros--) {
                if ((bit = get_bit(&r)) < 0) return DAMAGED;
                v = v << 1 | (u32)bit;
            }
            plan->freq[t][i] = v - 1, sum += v - 1;
            if (v - 1 >= whole || sum > whole) return DAMAGED;
        }
        if (whole - sum >= whole) return DAMAGED;
        plan->freq[t][plan->entries - 1] = whole - sum;
    }
    if (plan->tables > 1)
        for (size_t b = 0; b < blocks; b++) {
            int number = 0;
            for (int i = class_bits(plan->tables); i; i--) {
                int bit = get_bit(&r);
                if (bit < 0) return DAMAGED;
                number = number << 1 | bit;
            }
            if (number >= plan->tables) return DAMAGED;
            classes[b] = (u8)number;
        }
    while (r.bit & 7)
        if (get_bit(&r)) return DAMAGED;
    return (int64_t)(n + r.bit / 8);
}

/* ---- the portable coder */

/* Of a bucket's own and its other entry: frequency, bias << 16, value << 32, and `from` << 48. */
static void pack_entries(const rans_table *table, u64 *entry) {
    for (int b = 0; b < table->buckets; b++) {
        const u64 from = (u64)table->from[b] << 48;
        entry[2 * b] = table->own_freq[b] | (u64)table->own_value[b] << 32 | from;
        entry[2 * b + 1] = table->other_freq[b] | (u32)table->bias[b] << 16 | (u64)table->other_value[b] << 32 | from;
    }
}

static inline u32 decoded(const u64 *entry, u32 mask, int shift, u32 x, u8 *out) {
    const u32 slot = x & 65535;
    const u64 *own = entry + 2 * (slot & mask);
    const u64 e = own[slot >= (u32)(own[0] >> 48)];
    *out = (u8)(e >> 32);
    return (u32)(e & 65535) * (x >> 16) + (((slot >> shift) + (u32)(e >> 16)) & 65535);
}

int rans_run_portable(const rans_table *table, rans_lanes *lanes, int number, size_t count, u8 *out) {
    const u32 mask = (u32)table->buckets - 1;
    const int shift = log2_of((u32)table->buckets);
    u64 entry[512];
    u32 state[MAX_LANES];
    u8 last[MAX_LANES];
    const u8 *w = lanes->words;
    pack_entries(table, entry);
    for (int i = 0; i < number; i++) state[i] = (u32)lanes->high[i] << 16 | lanes->low[i];
    for (size_t done = 0; done < count; done += (size_t)number) {
        u8 *to = count - done < (size_t)number ? last : out + done;
        if ((size_t)(lanes->end - w) >= 2 * (size_t)number) /* no step takes more */
            for (int i = 0; i < number; i++) {
                const u32 x = decoded(entry, mask, shift, state[i], to + i);
                const u32 more = (u32)(((u64)x - 65536) >> 63); /* 1 if x < 65536; a branch would be guessed wrong */
                state[i] = x << (16 * more) | (get16(w) & (0 - more));
                w += 2 * more;
            }
        else
            for (int i = 0; i < number; i++) {
                u32 x = decoded(entry, mask, shift, state[i], to + i);
                if (x < 65536) {
                    if (lanes->end - w < 2) return DAMAGED;
                    x = x << 16 | get16(w), w += 2;
                }
                state[i] = x;
            }
        if (to == last) memcpy(out + done, last, count - done);
    }
    for (int i = 0; i < number; i++) lanes->high[i] = (u16)(state[i] >> 16), lanes->low[i] = (u16)state[i];
    lanes->words = w;
    return OK;
}

size_t rans_code_portable(const rans_coder *coders, const rans_plan *plan, const u8 *classes, const u8 *entries,
                          size_t count, u16 *end, u32 *states) {
    const u32 mask = (u32)plan->lanes - 1, shift = (u32)(16 - plan->precision), fine = (1u << shift) - 1;
    const u32 k = (u32)plan->buckets;
    u16 *w = end;
    for (u32 i = 0; i <= mask; i++) states[i] = 65536;
    for (size_t i = count; i-- > 0;) {
        const rans_coder *coder = coders + (classes ? classes[i / BLOCK] : 0);
        u32 x = states[i & mask], s = entries[i], f = coder->freq[s];
        if (x >> 16 >= f) *--w = (u16)x, x >>= 16;
        u32 q = x / f, r = x - q * f;
        states[i & mask] = q << 16 | (u32)(coder->map[coder->start[s] + (r >> shift)] + (r & fine) * k);
    }
    return (size_t)(end - w);
}
