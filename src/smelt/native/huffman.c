/* Huffman codes of at most 12 bits (docs/format.md, "Huffman").

   The decoder looks 12 bits up at once, which gives up to six symbols, and decodes four segments side by side. */
#include <stdlib.h>

#include "native.h"

enum { LONGEST = 12, TABLE = 1 << LONGEST, LISTED = 4, MOST_SEGMENTS = 8 };
/* From so many symbols on four segments are worth their lengths, and the table for LONGEST bits its making. */
enum { MANY_TO_ENCODE = 16384, MANY_TO_DECODE = 1536 };

#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

/* ---- codes */

static int sort_by_count(const u32 *counts, u64 *keys) {
    static const int gaps[] = {57, 23, 10, 4, 1}; /* Ciura 2001, doi:10.1007/3-540-44669-9_12 */
    int number = 0;
    for (int symbol = 0; symbol < 256; symbol++)
        if (counts[symbol]) keys[number++] = (u64)counts[symbol] << 8 | (u64)symbol;
    for (int g = 0; g < 5; g++)
        for (int i = gaps[g]; i < number; i++) {
            const u64 key = keys[i];
            int j = i;
            for (; j >= gaps[g] && keys[j - gaps[g]] > key; j -= gaps[g]) keys[j] = keys[j - gaps[g]];
            keys[j] = key;
        }
    return number;
}

/* The best lengths up to LONGEST, by package-merge (Larmore & Hirschberg 1990, doi:10.1145/79147.79150).  The items of
   a level are the symbols and the pairs of items of the level before, the lightest first. */
static void find_lengths(const u32 *counts, u8 *lengths) {
    u64 keys[256], symbols[257], pairs[257], items[512];
    u16 symbols_among[LONGEST][513]; /* the first so many items of a level */
    const int number = sort_by_count(counts, keys);
    int total = 0;
    for (int i = 0; i < number; i++) symbols[i] = keys[i] >> 8;
    symbols[number] = UINT64_MAX;
    for (int level = 0; level < LONGEST; level++) {
        int from_symbols = 0, from_pairs = 0;
        for (int i = 0; i < total / 2; i++) pairs[i] = items[2 * i] + items[2 * i + 1];
        pairs[total / 2] = UINT64_MAX;
        total = number + total / 2;
        for (int i = 0; i < total; i++) {
            const u64 symbol = symbols[from_symbols], pair = pairs[from_pairs];
            const int lighter = symbol <= pair;
            items[i] = lighter ? symbol : pair;
            symbols_among[level][i] = (u16)from_symbols;
            from_symbols += lighter, from_pairs += !lighter;
        }
        symbols_among[level][total] = (u16)from_symbols;
    }
    memset(lengths, 0, 256);
    for (int level = LONGEST - 1, taken = 2 * number - 2; level >= 0; level--) {
        const int those = symbols_among[level][taken];
        for (int i = 0; i < those; i++) lengths[keys[i] & 255]++;
        taken = 2 * (taken - those);
    }
}

/* The words as they lie in the stream: their first bit is the lowest. */
static void find_words(const u8 *lengths, u16 *words) {
    u32 of_length[LONGEST + 1] = {0}, next[LONGEST + 1] = {0};
    for (int symbol = 0; symbol < 256; symbol++) of_length[lengths[symbol]]++;
    for (int length = 2; length <= LONGEST; length++) next[length] = (next[length - 1] + of_length[length - 1]) << 1;
    for (int symbol = 0; symbol < 256; symbol++) {
        if (!lengths[symbol]) continue;
        u32 word = next[lengths[symbol]]++;
        word = (word & 0x5555) << 1 | (word >> 1 & 0x5555);
        word = (word & 0x3333) << 2 | (word >> 2 & 0x3333);
        word = (word & 0x0F0F) << 4 | (word >> 4 & 0x0F0F);
        word = (word & 0x00FF) << 8 | (word >> 8 & 0x00FF);
        words[symbol] = (u16)(word >> (16 - lengths[symbol]));
    }
}

/* ---- encoder */

typedef struct {
    u8 lengths[256];
    int number, first, span; /* of the symbols that occur */
    int listed, segments;
    u64 head, bits; /* bytes before the lengths of the segments; bits of all words */
} code_plan;

static int make_plan(size_t count, const u32 *counts, code_plan *plan) {
    int last = 0;
    plan->number = 0, plan->bits = 0;
    for (int symbol = 0; symbol < 256; symbol++) {
        if (!counts[symbol]) continue;
        if (!plan->number++) plan->first = symbol;
        last = symbol;
    }
    if (plan->number < 2) return WRONG_CALL;
    find_lengths(counts, plan->lengths);
    for (int symbol = 0; symbol < 256; symbol++) plan->bits += (u64)counts[symbol] * plan->lengths[symbol];
    plan->span = last - plan->first + 1;
    const int as_list = 1 + plan->number + (plan->number + 1) / 2, as_span = 2 + (plan->span + 1) / 2;
    plan->listed = as_list < as_span;
    plan->head = 1 + (u64)(plan->listed ? as_list : as_span);
    plan->segments = count < MANY_TO_ENCODE ? 1 : 4;
    return OK;
}

static u64 varint_size(u64 value) {
    u64 size = 1;
    for (; value > 127; value >>= 7) size++;
    return size;
}

/* The counts do not tell the lengths of four segments: then it may be some bytes more than will be needed. */
int64_t huffman_size(size_t count, const u32 *counts) {
    code_plan plan;
    if (make_plan(count, counts, &plan) != OK) return WRONG_CALL;
    if (plan.segments == 1) return (int64_t)(plan.head + (plan.bits + 7) / 8);
    const u64 longest = (((u64)count + 3) / 4 * LONGEST + 7) / 8, all = (plan.bits + 4 * 7) / 8;
    return (int64_t)(plan.head + 3 * varint_size(all < longest ? all : longest) + all);
}

static u8 *write_head(const code_plan *plan, u8 *out) {
    u8 of_table[256];
    int number = 0;
    *out++ = (u8)((plan->segments == 4) | (plan->listed ? LISTED : 0));
    if (!plan->listed) *out++ = (u8)plan->first;
    *out++ = (u8)((plan->listed ? plan->number : plan->span) - 1);
    for (int symbol = plan->first; symbol < plan->first + plan->span; symbol++) {
        if (plan->listed && !plan->lengths[symbol]) continue;
        of_table[number++] = plan->lengths[symbol];
        if (plan->listed) *out++ = (u8)symbol;
    }
    for (int i = 0; i < number; i += 2) *out++ = (u8)(of_table[i] << 4 | (i + 1 < number ? of_table[i + 1] : 0));
    return out;
}

/* The lowest bytes of `bits`; where there is room all, of which the next writer overwrites the rest. */
INLINE u8 *write_bytes(u8 *out, const u8 *end, u64 bits, size_t bytes) {
    if (end - out >= 8) put64(out, bits);
    else if ((size_t)(end - out) < bytes) return NULL;
    else
        for (size_t i = 0; i < bytes; i++) out[i] = (u8)(bits >> 8 * i);
    return out + bytes;
}

/* Codes: length << 16 | word.  Returns the end of the segment, or NULL where it would be behind `end`. */
static u8 *write_segment(const u32 *codes, const u8 *symbols, size_t count, u8 *out, const u8 *end) {
    u64 bits = 0;
    u32 filled = 0;
    size_t i = 0;
    for (; count - i >= 4; i += 4) {
        const u8 *four = symbols + i;
        const u32 a = codes[four[0]], b = codes[four[1]], c = codes[four[2]], d = codes[four[3]];
        const u32 ab = (a & 0xFFFF) | (b & 0xFFFF) << (a >> 16), ab_length = (a >> 16) + (b >> 16);
        const u32 cd = (c & 0xFFFF) | (d & 0xFFFF) << (c >> 16), cd_length = (c >> 16) + (d >> 16);
        bits |= (ab | (u64)cd << ab_length) << filled;
        filled += ab_length + cd_length;
        out = write_bytes(out, end, bits, filled >> 3);
        if (!out) return NULL;
        bits >>= filled & ~7u;
        filled &= 7;
    }
    for (; i < count; i++) {
        bits |= (u64)(codes[symbols[i]] & 0xFFFF) << filled;
        filled += codes[symbols[i]] >> 16;
    }
    return write_bytes(out, end, bits, (filled + 7) >> 3);
}

int64_t huffman_encode(const u8 *symbols, size_t count, const u32 *counts, u8 *out, size_t cap) {
    code_plan plan;
    u16 words[256] = {0};
    u32 codes[256];
    u8 varints[MOST_SEGMENTS * 10];
    size_t length = 0, begun = 0;
    if (make_plan(count, counts, &plan) != OK) return WRONG_CALL;
    if (cap < plan.head || cap - plan.head < plan.bits / 8) return NO_ROOM;
    find_words(plan.lengths, words);
    for (int symbol = 0; symbol < 256; symbol++) codes[symbol] = (u32)plan.lengths[symbol] << 16 | words[symbol];
    const size_t segments = (size_t)plan.segments, share = count / segments + (count % segments != 0);
    u8 *start = write_head(&plan, out), *end = start;
    for (size_t k = 0; k < segments; k++) {
        const size_t number = count - begun < share ? count - begun : share;
        u8 *next = write_segment(codes, symbols + begun, number, end, out + cap);
        if (!next) return NO_ROOM;
        if (k < segments - 1) {
            size_t size = (size_t)(next - end);
            for (; size > 127; size >>= 7) varints[length++] = (u8)(size | 128);
            varints[length++] = (u8)size;
        }
        begun += number, end = next;
    }
    if (length > (size_t)(out + cap - end)) return NO_ROOM;
    memmove(start + length, start, (size_t)(end - start));
    memcpy(start, varints, length);
    return end + length - out;
}

/* ---- decoder: tables */

/* An entry tells what some bits begin with: in bits 0-7 how many of them are used up, in bytes 1-6 the symbols, in bits
   57-60 the length of the first one's word, in bits 61-63 how many symbols. */
enum { MOST_AT_ONCE = 6 };
INLINE u64 first_entry(u64 symbol, u64 length) { return (u64)1 << 61 | length << 57 | symbol << 8 | length; }
INLINE u32 used_bits(u64 entry) { return (u32)entry & 63; }
INLINE u32 first_length(u64 entry) { return (u32)(entry >> 57) & 15; }
INLINE u32 symbols_of(u64 entry) { return (u32)(entry >> 61); }

/* The entries for b bits are tables[2^b .. 2^(b+1)).  They are those for b-1 bits, whatever the last bit is; but where
   a word ends with it, what the bits before the word give, and its symbol.  `full` lists, at the same place, the bits
   that are used up and leave room for a symbol. */
static void fill_tables(const u8 *lengths, const u16 *words, int most_bits, u64 *tables) {
    u16 full[2 * TABLE];
    size_t numbers[LONGEST + 1] = {1};
    u8 symbols[256];
    int occurring = 0;
    for (int symbol = 0; symbol < 256; symbol++)
        if (lengths[symbol]) symbols[occurring++] = (u8)symbol;
    tables[1] = 0, full[1] = 0;
    for (int bits = 1; bits <= most_bits; bits++) {
        const size_t half = (size_t)1 << (bits - 1), size = 2 * half;
        u16 *listed = full + size;
        memcpy(tables + size, tables + half, half * sizeof *tables);
        memcpy(tables + size + half, tables + half, half * sizeof *tables);
        for (int k = 0; k < occurring; k++) {
            const u64 symbol = symbols[k];
            const int length = lengths[symbol], before = bits - length;
            if (before < 0) continue;
            if (!before) {
                tables[size + words[symbol]] = first_entry(symbol, (u64)length);
                *listed++ = words[symbol];
                continue;
            }
            const size_t place = (size_t)1 << before;
            for (size_t i = 0; i < numbers[before]; i++) {
                const size_t index = full[place + i], longer = index | (size_t)words[symbol] << before;
                const u64 entry = tables[place + index], number = symbols_of(entry);
                tables[size + longer] = entry + ((u64)1 << 61 | (u64)length) + (symbol << (8 + 8 * number));
                *listed = (u16)longer;
                listed += number + 1 < MOST_AT_ONCE;
            }
        }
        numbers[bits] = (size_t)(listed - (full + size));
    }
}

/* ---- decoder */

/* Reads the lengths of the words; returns the longest, or DAMAGED. */
static int read_lengths(const u8 **at, const u8 *end, int listed, u8 *lengths) {
    const u8 *in = *at, *list = NULL;
    int first = 0, longest = 0;
    u32 sum = 0;
    memset(lengths, 0, 256);
    if (end - in < 2) return DAMAGED;
    if (!listed) first = *in++;
    const int number = *in++ + 1;
    if (end - in < (listed ? number : 0) + (number + 1) / 2 || first + number > 256) return DAMAGED;
    if (listed) list = in, in += number;
    for (int i = 0; i < number; i++) {
        const int length = i & 1 ? *in++ & 15 : *in >> 4;
        if (length > LONGEST || (list && i && list[i] <= list[i - 1])) return DAMAGED;
        lengths[list ? list[i] : first + i] = (u8)length;
        longest = length > longest ? length : longest;
        sum += length ? TABLE >> length : 0;
    }
    if ((number & 1 && *in++ & 15) || sum != TABLE) return DAMAGED;
    *at = in;
    return longest;
}

typedef struct {
    const u8 *in, *in_end;
    u8 *out, *out_end;
    u32 used; /* bits of in[0] */
} lane;

static int read_lanes(const u8 *in, const u8 *end, u8 *out, size_t count, size_t segments, lane *lanes) {
    const size_t share = count / segments + (count % segments != 0);
    u64 sizes[MOST_SEGMENTS] = {0};
    for (size_t k = 0; k < segments - 1; k++)
        for (int shift = 0, more = 1; more; shift += 7) {
            if (in == end || shift == 49) return DAMAGED;
            sizes[k] |= (u64)(*in & 127) << shift;
            more = *in++ >> 7;
        }
    for (size_t k = 0; k < segments; k++) {
        const size_t rest = (size_t)(end - in), number = count < share ? count : share;
        if (sizes[k] > rest) return DAMAGED;
        const size_t size = k < segments - 1 ? (size_t)sizes[k] : rest;
        lanes[k] = (lane){in, in + size, out, out + number, 0};
        in += size, out += number, count -= number;
    }
    return OK;
}

/* Symbol by symbol to the end of the lane, where no bit but the zeros of the last byte may be left. */
static int finish_lane(const lane *own, const u64 *table, u32 mask) {
    const u8 *in = own->in;
    u32 used = own->used;
    for (u8 *out = own->out; out < own->out_end;) {
        const size_t rest = (size_t)(own->in_end - in);
        u64 bits = 0;
        if (rest >= 8) bits = get64(in);
        else
            for (size_t i = 0; i < rest; i++) bits |= (u64)in[i] << 8 * i;
        bits >>= used;
        for (int i = 0; i < 4 && out < own->out_end; i++) {
            const u64 entry = table[bits & mask];
            *out++ = (u8)(entry >> 8);
            bits >>= first_length(entry);
            used += first_length(entry);
        }
        if (rest < 8 && used > 8 * rest) return DAMAGED;
        in += used >> 3, used &= 7;
    }
    if (used && *in++ >> used) return DAMAGED;
    return in == own->in_end ? OK : DAMAGED;
}

/* As far as no lane comes near an end: a step reads 8 bytes and goes on by 7 at most; its four look-ups give up to 24
   symbols, and write 2 bytes more.  Only the lowest six bits of `left`, the number of bits, mean anything. */
INLINE void run_lanes(lane *lanes, int number, const u64 *table) {
    const u8 *in[4];
    u8 *out[4];
    u64 bits[4];
    u32 left[4];
    for (int k = 0; k < number; k++) {
        const u32 used = lanes[k].used;
        in[k] = lanes[k].in + (used > 0), out[k] = lanes[k].out;
        bits[k] = used ? *lanes[k].in >> used : 0, left[k] = (8 - used) & 7;
    }
    for (;;) {
        size_t steps = SIZE_MAX;
        for (int k = 0; k < number; k++) {
            const size_t in_rest = (size_t)(lanes[k].in_end - in[k]), out_rest = (size_t)(lanes[k].out_end - out[k]);
            const size_t in_steps = in_rest < 8 ? 0 : (in_rest - 1) / 7;
            const size_t out_steps = out_rest < 26 ? 0 : (out_rest - 2) / 24;
            steps = steps < in_steps ? steps : in_steps;
            steps = steps < out_steps ? steps : out_steps;
        }
        if (!steps) break;
        for (; steps; steps--) {
            for (int k = 0; k < number; k++) {
                bits[k] |= get64(in[k]) << (left[k] & 63);
                in[k] += ~left[k] >> 3 & 7;
                left[k] |= 56;
            }
            for (int round = 0; round < 4; round++)
                for (int k = 0; k < number; k++) {
                    const u64 entry = table[bits[k] & (TABLE - 1)];
                    put64(out[k], entry >> 8);
                    bits[k] >>= used_bits(entry);
                    left[k] -= (u32)entry;
                    out[k] += symbols_of(entry);
                }
        }
    }
    for (int k = 0; k < number; k++) {
        lanes[k].in = in[k] - ((left[k] & 63) + 7) / 8, lanes[k].out = out[k];
        lanes[k].used = (8 - left[k]) & 7;
    }
}

/* Where some lanes are slower than others, their neighbours mostly are too. */
static void run_all(lane *lanes, int number, const u64 *table) {
    for (int k = 0; k + 4 <= number; k += 4) run_lanes(lanes + k, 4, table);
    for (int k = 0; k + 2 <= number; k += 2) run_lanes(lanes + k, 2, table);
    for (int k = 0; k < number; k++) run_lanes(lanes + k, 1, table);
}

int huffman_decode(const u8 *in, size_t size, u8 *out, size_t count) {
    lane lanes[MOST_SEGMENTS];
    u8 lengths[256];
    u16 words[256] = {0};
    if (!size || in[0] > 7 || (in[0] & 3) == 3) return DAMAGED;
    const u8 *at = in + 1;
    const int segments = in[0] & 3 ? 2 << (in[0] & 3) : 1;
    const int longest = read_lengths(&at, in + size, in[0] & LISTED, lengths);
    if (longest < 0 || read_lanes(at, in + size, out, count, (size_t)segments, lanes) != OK) return DAMAGED;
    const int bits = count < MANY_TO_DECODE ? longest : LONGEST;
    u64 *tables = malloc(((size_t)2 << bits) * sizeof *tables);
    if (!tables) return NO_MEMORY;
    const u64 *table = tables + ((size_t)1 << bits);
    find_words(lengths, words);
    fill_tables(lengths, words, bits, tables);
    if (bits == LONGEST) run_all(lanes, segments, table);
    int result = OK;
    for (int k = 0; k < segments && result == OK; k++) result = finish_lane(&lanes[k], table, ((u32)1 << bits) - 1);
    free(tables);
    return result;
}
