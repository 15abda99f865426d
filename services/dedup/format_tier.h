/*
 * What lies where on the fast device, byte by byte. docs/format.md explains it; this file is the layout's only home.
 *
 *   block 0                      superblock
 *   block 1 .. table_blocks      table: page p says what lies in places 168 p .. 168 p + 167
 *   then                         places, a block each: place i at block 1 + table_blocks + i
 *
 * All of it is a copy of what the main device holds, so nothing here need be believed: a block read from here counts only
 * if it has the fingerprint that the main store keeps for its PBA, and any of it may be lost, old or wrong.
 *
 * All numbers are little-endian. Checksums are XXH3-64 of the bytes behind them.
 */
#ifndef ATOLL_DEDUP_FORMAT_TIER_H
#define ATOLL_DEDUP_FORMAT_TIER_H

#include <stddef.h>
#include <stdint.h>

#define FORMAT_TIER_VERSION 1
#define FORMAT_TIER_MAGIC 0x3154464c4c4f5441u       /* "ATOLLFT1", in all versions */
#define FORMAT_TIER_TABLE_MAGIC 0x3150464c4c4f5441u /* "ATOLLFP1" */
#define FORMAT_TIER_ENTRIES 168                     /* in a page of the table */
#define FORMAT_TIER_SEED 0x74696572u                /* of the superblock's checksum; a table page's is format_id + its number */

struct format_tier_super {
    uint64_t checksum;      /*  0  of bytes 8..511 */
    uint64_t magic;         /*  8  FORMAT_TIER_MAGIC */
    uint32_t version;       /* 16  FORMAT_TIER_VERSION */
    uint32_t reserved_a;    /* 20  0 */
    uint64_t uuid_low;      /* 24  of the main store */
    uint64_t uuid_high;     /* 32 */
    uint64_t format_id;     /* 40  drawn when it was formatted: tables of an earlier time do not pass */
    uint64_t places;        /* 48 */
    uint64_t table_blocks;  /* 56 */
    uint64_t written_s;     /* 64  Unix time */
    uint64_t reserved[55];  /* 72  0 */
};

struct format_tier_entry {
    uint64_t pba;           /*  0  of the main store; 0: the place is free */
    uint64_t print_low;     /*  8  fingerprint of the block when it was copied */
    uint64_t print_high;    /* 16 */
};

struct format_tier_page {
    uint64_t checksum;      /*  0  of bytes 8..4095 */
    uint64_t magic;         /*  8  FORMAT_TIER_TABLE_MAGIC */
    uint64_t page;          /* 16  its number, from 0 */
    uint64_t reserved[5];   /* 24  0 */
    struct format_tier_entry entries[FORMAT_TIER_ENTRIES]; /* 64 */
};

_Static_assert(sizeof(struct format_tier_super) == 512, "superblock");
_Static_assert(sizeof(struct format_tier_page) == 4096 && offsetof(struct format_tier_page, entries) == 64, "a table page is a page");

/* Places that a device of so many blocks has room for, at most `most`. */
static inline uint64_t format_tier_places(uint64_t device_blocks, uint64_t most)
{
    uint64_t room = device_blocks > 2 ? (device_blocks - 2) * FORMAT_TIER_ENTRIES / (FORMAT_TIER_ENTRIES + 1) : 0;
    return room < most ? room : most;
}
static inline uint64_t format_tier_table_blocks(uint64_t places) { return (places + FORMAT_TIER_ENTRIES - 1) / FORMAT_TIER_ENTRIES; }

#endif
