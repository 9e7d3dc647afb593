#undef malloc /* the names of these */
#undef calloc
#undef free

#include "memory.h"

#include <malloc.h>
#include <stdio.h>
#include <stdlib.h>

void *watched_malloc(size_t size);
void *watched_calloc(size_t number, size_t size);
void watched_free(void *at);

size_t in_use, most_in_use, asked;
static size_t failing;

void watch(size_t fails) { in_use = most_in_use = asked = 0, failing = fails; }

static void *taken(void *at) {
    in_use += malloc_usable_size(at);
    if (in_use > most_in_use) most_in_use = in_use;
    return at;
}

void *watched_malloc(size_t size) { return ++asked == failing ? NULL : taken(malloc(size)); }
void *watched_calloc(size_t number, size_t size) { return ++asked == failing ? NULL : taken(calloc(number, size)); }

void watched_free(void *at) {
    in_use -= malloc_usable_size(at);
    free(at);
}

void check(int right, const char *what) {
    if (right) return;
    fprintf(stderr, "%s\n", what);
    abort();
}
