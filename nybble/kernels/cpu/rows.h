/* Rows of any length, sixteen elements at a time. */
#ifndef NYBBLE_ROWS_H
#define NYBBLE_ROWS_H

#include "simd.h"

#define PARALLEL_WORK 16384 /* elements below which waking the other threads costs more */

INLINE f32x16 load_part(const void *p, long i, long n, int kind) {
    return n - i >= LANES ? load_kind(p, i, kind) : load_tail(p, i, n - i, kind);
}

INLINE void store_part(void *p, long i, long n, f32x16 v, int kind) {
    if (n - i >= LANES) store_kind(p, i, v, kind);
    else store_tail(p, i, v, n - i, kind);
}

#endif
