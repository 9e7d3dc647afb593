/* Memory that is watched, and that can run out: run.sh compiles the library so that it asks here. */
#ifndef SMELT_FUZZ_MEMORY_H
#define SMELT_FUZZ_MEMORY_H

#include <stddef.h>

/* Of what was asked for since watch(): bytes that were not given back, the most there were at once, how often. */
extern size_t in_use, most_in_use, asked;

/* From now on; request number `fails` gets nothing, the first being 1. */
void watch(size_t fails);

void check(int right, const char *what); /* or the end */

#endif
