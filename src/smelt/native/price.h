/* What it would cost to write symbols, in 1/65536 bit: integers, so that every machine chooses the same. */
#ifndef SMELT_PRICE_H
#define SMELT_PRICE_H

#include "rans.h"

enum { AUTO, ONLY_RANS, ONLY_HUFFMAN };

/* Decoding takes several times as long with 256 buckets as with fewer; they must save a 128th. */
enum { SLOWER = 128 };

#define BIT ((u64)65536)
#define NONE (~(u64)0)

/* A way to code a plane of symbols by rANS, and its price. */
typedef struct {
    rans_plan plan;
    u32 counts[256]; /* of the entries */
    u8 entry[256];   /* of the symbols */
    u64 price;
} choice;

u32 log2_fixed(u32 v); /* log2(v) * 65536, rounded down; v > 0 */
void histogram(const u8 *symbols, size_t count, int level, u32 *counts);

/* The best rANS of one table for symbols that occur `counts` times. */
void price_plane(const u32 *counts, size_t count, choice *best);

/* By Huffman codes; NONE where there is but one symbol. */
u64 price_huffman(const u32 *counts, size_t count);

/* entries[i] = c->entry[symbols[i]]; and where several tables save 1/1000 they enter the plan and `classes` says
   which block of 1024 takes which.  Returns OK or NO_MEMORY. */
int map_and_group(choice *c, const u8 *symbols, size_t count, int level, u8 *entries, u8 *classes);

#endif
