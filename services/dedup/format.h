/*
 * What lies where on the device, byte by byte. docs/format.md explains it; this file is the layout's only home.
 *
 *   block 0, N-2                superblock of even generations, copies 0 and 1      (N: device blocks of the store)
 *   block 1, N-1                superblock of odd generations, copies 0 and 1
 *   block 2 ..                  metadata log, copy 0: block of sequence s at 2 + s % log_blocks
 *   block N-2-log_blocks ..     metadata log, copy 1: likewise
 *   between them                data blocks and metadata pages, from one allocator
 *
 * All numbers are little-endian. Checksums are XXH3-64 with a seed made of the store's identity and of what the block
 * is (format_seed), so that a block of another place, store or kind does not pass.
 *
 * Metadata pages are numbered in one row, so that one tree of pointers finds them all:
 *
 *   0 .. 31                     volume table, 8 entries a page
 *   refs_base ..                reference counts, u32 x 1024 a page, by PBA
 *   prints_base ..              fingerprints, 16 bytes x 256 a page, by PBA
 *   leaves_base ..              map leaves, u64 x 512 a page; the pointer's key says whose
 *   level_base[k] ..            directory pages of level k >= 1: 128 pointers to pages of level k - 1 (0: those above)
 *
 * The superblock holds the pointers to the pages of the last level (at most 8). A pointer with primary == 0 stands for
 * a page of zeros, which takes no space.
 */
#ifndef ATOLL_DEDUP_FORMAT_H
#define ATOLL_DEDUP_FORMAT_H

#include <stddef.h>
#include <stdint.h>

#define FORMAT_VERSION 1
#define FORMAT_SUPER_MAGIC 0x3142534c4c4f5441u /* "ATOLLSB1" */
#define FORMAT_LOG_MAGIC 0x31474c4c4c4f5441u   /* "ATOLLLG1" */

#define FORMAT_SUPER_BYTES 512     /* one sector: it is written whole or not at all; the rest of its block is zero */
#define FORMAT_SUPER_BLOCKS 2      /* at either end of the device */
#define FORMAT_ROOT_POINTERS 8
#define FORMAT_LEVELS 6            /* directory levels at most: 8 * 128^6 pages */
#define FORMAT_POINTERS 128        /* in a directory page */
#define FORMAT_VOLUME_PAGES 32
#define FORMAT_VOLUMES_PER_PAGE 8
#define FORMAT_REFS_PER_PAGE 1024
#define FORMAT_PRINTS_PER_PAGE 256
#define FORMAT_LEAF_ENTRIES 512
#define FORMAT_DEVICE_BLOCKS_MIN 1024
#define FORMAT_DEVICE_BLOCKS_MAX ((uint64_t)1 << 36) /* 256 TiB; a PBA has its place in a fingerprint cache entry */
#define FORMAT_LOG_BLOCKS_MIN 64
#define FORMAT_VOLUME_BYTES_MAX ((uint64_t)1 << 60)  /* an LBA has 48 bits; a record has room for 52 */

/* A page of metadata: where it is (twice), and what is right there. */
struct format_pointer {
    uint64_t key;       /*  0  map leaf: volume << 52 | leaf; else 0 */
    uint64_t primary;   /*  8  PBA; 0: all zeros, not stored */
    uint64_t mirror;    /* 16  PBA of the second copy */
    uint64_t checksum;  /* 24  of the 4096 bytes, seeded with (FORMAT_SEED_PAGE, page number ^ key) */
};

enum format_super_flag { FORMAT_SUPER_CLEAN = 1 /* closed: the log behind log_start was empty */ };

struct format_super {
    uint64_t checksum;      /*   0  of bytes 8..511, seeded with (FORMAT_SEED_SUPER, place 0..3) and no store */
    uint64_t magic;         /*   8  FORMAT_SUPER_MAGIC, in all versions */
    uint32_t version;       /*  16  FORMAT_VERSION, in all versions here */
    uint32_t flags;         /*  20  enum format_super_flag */
    uint64_t uuid_low;      /*  24  of the store */
    uint64_t uuid_high;     /*  32 */
    uint64_t generation;    /*  40  the newest valid one wins; its lowest bit is the pair's number */
    uint64_t device_blocks; /*  48  N */
    uint64_t log_blocks;    /*  56  of each copy of the log */
    uint64_t log_start;     /*  64  sequence of the first log block to replay */
    uint64_t log_chain;     /*  72  checksum of the log block before that one (0 if none) */
    uint64_t log_durable;   /*  80  log blocks before this sequence were durable: the log must reach at least here */
    uint64_t leaf_slots;    /*  88  pages from leaves_base on */
    uint64_t written_s;     /*  96  Unix time */
    uint32_t root_count;    /* 104  pointers in use below */
    uint32_t levels;        /* 108  directory levels */
    uint64_t reserved[18];  /* 112  0 */
    struct format_pointer roots[FORMAT_ROOT_POINTERS]; /* 256 */
};

/* A block of the metadata log. Records of one change never straddle blocks, so a block is replayed whole or not at all. */
struct format_log_header {
    uint64_t checksum;      /*  0  of bytes 8..4095, seeded with (FORMAT_SEED_LOG, sequence) */
    uint64_t magic;         /*  8  FORMAT_LOG_MAGIC */
    uint64_t sequence;      /* 16  from 1 */
    uint64_t chain;         /* 24  checksum of the block before: a left-over of another past does not fit */
    uint64_t durable;       /* 32  blocks before this sequence were durable when this one was sealed */
    uint64_t generation;    /* 40  of the root at that time */
    uint32_t version;       /* 48 */
    uint32_t used_bytes;    /* 52  of records, a multiple of 8 */
    uint64_t reserved;      /* 56  0 */
};
/* Entries of one HOLES record: with their REFS records they fit a block. */
#define FORMAT_HOLES_MAX 64
#define FORMAT_LOG_RECORD_BYTES (4096 - sizeof(struct format_log_header))

/* Records: words; type in the top 4 bits of the first. All values are absolute, so a record may be applied again. */
enum format_record {
    FORMAT_RECORD_END = 0,     /* nothing follows in this block */
    FORMAT_RECORD_MAP = 1,     /* volume << 52 | lba; map value                                 2 words */
    FORMAT_RECORD_REFS = 2,    /* pba; reference count (0: free)                                2 words */
    FORMAT_RECORD_BLOCK = 3,   /* pba; reference count; fingerprint low, high                   4 words */
    FORMAT_RECORD_HOLES = 4,   /* volume << 52 | first lba; blocks (<= 64, in one leaf) -> HOLE   2 words */
    FORMAT_RECORD_VOLUME = 5   /* id; struct format_volume                                     65 words */
};
#define FORMAT_RECORD(type, rest) ((uint64_t)(type) << 60 | (uint64_t)(rest))
#define FORMAT_RECORD_TYPE(word) ((uint32_t)((word) >> 60))
#define FORMAT_RECORD_REST(word) ((word) & 0x0fffffffffffffffu)
#define FORMAT_KEY(volume, number) ((uint64_t)(volume) << 52 | (uint64_t)(number))
#define FORMAT_KEY_VOLUME(key) ((uint32_t)((key) >> 52 & 0xff))
#define FORMAT_KEY_NUMBER(key) ((key) & 0x000fffffffffffffu)

struct format_volume {
    uint32_t id;            /*   0  index in the table */
    uint32_t generation;    /*   4 */
    uint32_t state;         /*   8  enum atoll_volume_state */
    uint32_t flags;         /*  12  enum atoll_volume_flag */
    uint32_t threshold;     /*  16  run threshold (THN): 1..64; 0 stands for the default, 1 */
    uint32_t name_bytes;    /*  20 */
    uint64_t size_bytes;    /*  24 */
    uint64_t created_s;     /*  32  Unix time */
    char name[256];         /*  40  UTF-8, the rest zeros */
    uint32_t tier_threshold; /* 296  references that move a block to the fast tier: 1..1,000,000; 0: the default, 8 */
    uint8_t reserved[212];  /* 300  0 */
};

_Static_assert(sizeof(struct format_pointer) == 32, "pointer");
_Static_assert(sizeof(struct format_super) == FORMAT_SUPER_BYTES, "a superblock is one sector");
_Static_assert(offsetof(struct format_super, reserved) == 112 && offsetof(struct format_super, roots) == 256, "superblock");
_Static_assert(sizeof(struct format_log_header) == 64, "log header");
_Static_assert(sizeof(struct format_volume) == 512 && offsetof(struct format_volume, name) == 40, "volume");
_Static_assert(FORMAT_POINTERS * sizeof(struct format_pointer) == 4096, "a directory page is a page");
_Static_assert(FORMAT_VOLUME_PAGES * FORMAT_VOLUMES_PER_PAGE == 256, "a place for each volume");

enum format_seed_kind { FORMAT_SEED_SUPER = 1, FORMAT_SEED_LOG = 2, FORMAT_SEED_PAGE = 3 };

/* `store` is uuid_low ^ uuid_high. */
static inline uint64_t format_seed(enum format_seed_kind kind, uint64_t store, uint64_t number)
{
    uint64_t seed = (store ^ (uint64_t)kind * 0x9e3779b97f4a7c15u) + number;
    seed = (seed ^ seed >> 31) * 0xbf58476d1ce4e5b9u;
    return seed ^ seed >> 29;
}

/* The row of pages of a store: a function of two numbers of the superblock. Levels begin at multiples of 128, so that
 * a directory page is a piece of the row of pointers. */
struct format_shape {
    uint64_t refs_base, prints_base, leaves_base;
    uint64_t level_base[FORMAT_LEVELS + 1]; /* [0] is 0; [k] first directory page of level k */
    uint64_t level_count[FORMAT_LEVELS + 1];
    uint32_t levels;                        /* last level: the one that the superblock points to */
    uint64_t total;                         /* pointers in the row, a multiple of 128 */
    uint64_t fixed_pages;                   /* pages but for the map leaves */
};

static inline struct format_shape format_shape(uint64_t device_blocks, uint64_t leaf_slots)
{
    struct format_shape shape = {0};
    shape.refs_base = FORMAT_VOLUME_PAGES;
    shape.prints_base = shape.refs_base + (device_blocks + FORMAT_REFS_PER_PAGE - 1) / FORMAT_REFS_PER_PAGE;
    shape.leaves_base = shape.prints_base + (device_blocks + FORMAT_PRINTS_PER_PAGE - 1) / FORMAT_PRINTS_PER_PAGE;
    shape.level_count[0] = shape.leaves_base + leaf_slots;
    shape.total = (shape.level_count[0] + FORMAT_POINTERS - 1) / FORMAT_POINTERS * FORMAT_POINTERS;
    shape.fixed_pages = shape.leaves_base;
    while (shape.level_count[shape.levels] > FORMAT_ROOT_POINTERS && shape.levels < FORMAT_LEVELS) {
        uint64_t count = (shape.level_count[shape.levels] + FORMAT_POINTERS - 1) / FORMAT_POINTERS;
        shape.levels++;
        shape.level_base[shape.levels] = shape.total;
        shape.level_count[shape.levels] = count;
        shape.fixed_pages += count;
        shape.total += (count + FORMAT_POINTERS - 1) / FORMAT_POINTERS * FORMAT_POINTERS;
    }
    return shape;
}

#endif
