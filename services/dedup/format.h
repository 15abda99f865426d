/*
 * What lies where on the device, byte by byte. docs/format.md explains it; this file is the layout's only home.
 *
 *   block 0, N-2                superblock of even generations, copies 0 and 1      (N: device blocks of the store)
 *   block 1, N-1                superblock of odd generations, copies 0 and 1
 *   block 2 ..                  metadata log, copy 0: block of sequence s at 2 + s % log_blocks
 *   then                        metadata pages, copy A: the first extent of slots
 *   then                        data blocks
 *   then                        metadata pages, copy B
 *   block log_second ..         metadata log, copy 1; behind it the superblocks' second copies
 *
 * A device that was grown has further extents: copy A where the store ended before, copy B before its new end.
 *
 * All numbers are little-endian. Checksums are XXH3-64 with a seed made of the store's identity and of what the block
 * is (format_seed), so that a block of another place, store or kind does not pass.
 *
 * Metadata pages are the leaves of six trees. A page has a number within its tree, which is known without looking
 * (enum format_tree); a directory page holds 256 pointers, and the superblock points to the top page of each tree. The levels
 * of a tree are fixed, so a volume or device of any size has the same tree. A pointer of zeros stands for a page
 * (and everything below it) of zeros, which takes no space.
 */
#ifndef ATOLL_DEDUP_FORMAT_H
#define ATOLL_DEDUP_FORMAT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define FORMAT_VERSION 3
#define FORMAT_VERSION_OLDEST 2 /* that is read; its log blocks have no flags. A root of this version is written before anybody is served */
#define FORMAT_SUPER_MAGIC 0x3142534c4c4f5441u /* "ATOLLSB1" */
#define FORMAT_LOG_MAGIC 0x31474c4c4c4f5441u   /* "ATOLLLG1" */

#define FORMAT_SUPER_BYTES 512     /* one sector: it is written whole or not at all; the rest of its block is zero */
#define FORMAT_SUPER_BLOCKS 2      /* at either end of the device */
#define FORMAT_POINTERS 256        /* in a directory page */
#define FORMAT_EXTENTS 8           /* of slots: a device can be grown one time less */
#define FORMAT_VOLUME_PAGES 32
#define FORMAT_VOLUMES_PER_PAGE 8
#define FORMAT_REFS_PER_PAGE 1024
#define FORMAT_PRINTS_PER_PAGE 256
#define FORMAT_LEAF_ENTRIES 512
#define FORMAT_GROUP_BLOCKS FORMAT_REFS_PER_PAGE /* a group is what one page of counts is about */
#define FORMAT_GROUPS_PER_PAGE 2048
#define FORMAT_SLOTS_PER_PAGE 32768 /* bits of a page */
#define FORMAT_SLOTS_RESERVED 8    /* first slots of each 32,768: places of the slot tree's own pages */
#define FORMAT_DEVICE_BLOCKS_MIN 1024
#define FORMAT_DEVICE_BLOCKS_MAX ((uint64_t)1 << 36) /* 256 TiB; a PBA has its place in a fingerprint cache entry */
#define FORMAT_LOG_BLOCKS_MIN 64
#define FORMAT_VOLUME_BYTES_MAX ((uint64_t)1 << 60)  /* an LBA has 48 bits; a record has room for 52 */

static inline bool format_version_read(uint32_t version) { return version >= FORMAT_VERSION_OLDEST && version <= FORMAT_VERSION; }

/* Where a page of metadata is, and what is right there. */
struct format_pointer {
    uint64_t checksum;  /*  0  of the 4096 bytes, seeded with (FORMAT_SEED_PAGE, FORMAT_PAGE(tree, level, number)) */
    uint32_t slot;      /*  8  0: all zeros, not stored (then all of the pointer is 0) */
    uint32_t reserved;  /* 12  0 */
};

/* Slots are numbered through all extents; the page of a slot has a copy in each of the two places. */
struct format_extent {
    uint64_t first;     /*  0  PBA of copy A of its first slot */
    uint64_t second;    /*  8  PBA of copy B */
    uint32_t count;     /* 16  slots; 0: extent not in use */
    uint32_t reserved;  /* 20  0 */
};

/* The trees and what the number of a page of level 0 is. */
enum format_tree {
    FORMAT_TREE_VOLUMES = 0,  /* volume table, 8 volumes a page: id / 8 */
    FORMAT_TREE_GROUPS = 1,   /* u16 x 2048: data blocks of a group that have a reference: PBA / 1024 / 2048 */
    FORMAT_TREE_REFS = 2,     /* reference counts, u32 x 1024: PBA / 1024 */
    FORMAT_TREE_PRINTS = 3,   /* fingerprints, 16 bytes x 256: PBA / 256 */
    FORMAT_TREE_MAP = 4,      /* map leaves, u64 x 512: volume << 39 | LBA / 512 */
    FORMAT_TREE_SLOTS = 5,    /* a bit per slot, 1: it holds a page of the other trees: slot / 32768 */
    FORMAT_TREES = 6
};
#define FORMAT_LEVELS 6       /* of directories at most */
/* Level of a tree's top directory page, which the superblock points to. */
static const uint8_t format_levels[FORMAT_TREES] = {1, 2, 4, 4, 6, 2};
#define FORMAT_PAGE(tree, level, number) ((uint64_t)(tree) << 56 | (uint64_t)(level) << 48 | (uint64_t)(number))
#define FORMAT_PAGE_TREE(page) ((uint32_t)((page) >> 56))
#define FORMAT_PAGE_LEVEL(page) ((uint32_t)((page) >> 48) & 0xff)
#define FORMAT_PAGE_NUMBER(page) ((page) & 0x0000ffffffffffffu)
#define FORMAT_LEAF_NUMBER(volume, leaf) ((uint64_t)(volume) << 39 | (uint64_t)(leaf))
#define FORMAT_LEAF_VOLUME(number) ((uint32_t)((number) >> 39))

enum format_super_flag { FORMAT_SUPER_CLEAN = 1 /* closed: the log behind log_start was empty */ };

struct format_super {
    uint64_t checksum;      /*   0  of bytes 8..511, seeded with (FORMAT_SEED_SUPER, place 0..3) and no store */
    uint64_t magic;         /*   8  FORMAT_SUPER_MAGIC, in all versions */
    uint32_t version;       /*  16  in all versions here */
    uint32_t flags;         /*  20  enum format_super_flag */
    uint64_t uuid_low;      /*  24  of the store */
    uint64_t uuid_high;     /*  32 */
    uint64_t generation;    /*  40  the newest valid one wins; its lowest bit is the pair's number */
    uint64_t device_blocks; /*  48  N */
    uint64_t log_blocks;    /*  56  of each copy of the log */
    uint64_t log_start;     /*  64  sequence of the first log block to replay */
    uint64_t log_chain;     /*  72  checksum of the log block before that one (0 if none) */
    uint64_t log_durable;   /*  80  log blocks before this sequence were durable: the log must reach at least here */
    uint64_t log_second;    /*  88  PBA of the first block of the log's copy 1 */
    uint64_t written_s;     /*  96  Unix time */
    uint64_t slots;         /* 104  of all extents, a multiple of 64 */
    uint64_t spare_slots;   /* 112  of them, kept for copies of pages that a checkpoint replaces */
    uint64_t map_pages;     /* 120  pages of the map's tree under this root, directories included */
    uint64_t stored_blocks; /* 128  data blocks with a reference, before the log block log_start */
    uint64_t zero_promises; /* 136  likewise */
    uint32_t extent_count;  /* 144  in use below */
    uint32_t reserved_word; /* 148  0 */
    uint64_t reserved[5];   /* 152  0 */
    struct format_pointer roots[FORMAT_TREES];     /* 192 */
    struct format_extent extents[FORMAT_EXTENTS];  /* 288 */
    uint64_t tail[4];       /* 480  0 */
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
    uint32_t flags;         /* 56  enum format_log_flag */
    uint32_t reserved;      /* 60  0 */
};
enum format_log_flag {
    /* Written before the device had been flushed: while no block follows, it counts only if the blocks that its BLOCK records name, and
     * that it leaves with a reference, are there. */
    FORMAT_LOG_UNFLUSHED = 1
};
/* Entries of one HOLES record: with their REFS records they fit a block. */
#define FORMAT_HOLES_MAX 64
#define FORMAT_LOG_RECORD_BYTES (4096 - sizeof(struct format_log_header))
#define FORMAT_LOG_WORDS (FORMAT_LOG_RECORD_BYTES / 8)

/* Records: words; type in the top 4 bits of the first. All values are absolute, so a record may be applied again. */
enum format_record {
    FORMAT_RECORD_END = 0,     /* nothing follows in this block */
    FORMAT_RECORD_MAP = 1,     /* volume << 52 | kind before << 50 | lba; map value             2 words */
    FORMAT_RECORD_REFS = 2,    /* pba; reference count (0: free)                                2 words */
    FORMAT_RECORD_BLOCK = 3,   /* pba; reference count; fingerprint low, high                   4 words */
    FORMAT_RECORD_HOLES = 4,   /* volume << 52 | first lba; FORMAT_HOLES: blocks (<= 64, in one leaf) -> HOLE, of
                                * which so many named a block, so many were promised zeros           2 words */
    FORMAT_RECORD_VOLUME = 5,  /* id; struct format_volume                                     65 words */
    FORMAT_RECORD_NOTHING = 6  /* 0; 0: there is a block, so the one before it counts              2 words */
};
#define FORMAT_RECORD(type, rest) ((uint64_t)(type) << 60 | (uint64_t)(rest))
#define FORMAT_RECORD_TYPE(word) ((uint32_t)((word) >> 60))
#define FORMAT_RECORD_REST(word) ((word) & 0x0fffffffffffffffu)
#define FORMAT_KEY(volume, number) ((uint64_t)(volume) << 52 | (uint64_t)(number))
#define FORMAT_KEY_VOLUME(key) ((uint32_t)((key) >> 52 & 0xff))
#define FORMAT_KEY_NUMBER(key) ((key) & 0x0003ffffffffffffu)
#define FORMAT_KEY_BEFORE(key) ((uint32_t)((key) >> 50) & 3) /* kind of the persistent value that the entry had */
#define FORMAT_HOLES(blocks, named, zeros) ((uint64_t)(zeros) << 32 | (uint64_t)(named) << 16 | (uint64_t)(blocks))

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
    uint32_t reserved_word; /* 300  0 */
    uint64_t mapped_blocks; /* 304  entries that name a block, before the log block log_start; 0 in a log record */
    uint8_t reserved[200];  /* 312  0 */
};

_Static_assert(sizeof(struct format_pointer) == 16 && sizeof(struct format_extent) == 24, "pointer, extent");
_Static_assert(sizeof(struct format_super) == FORMAT_SUPER_BYTES, "a superblock is one sector");
_Static_assert(offsetof(struct format_super, roots) == 192 && offsetof(struct format_super, extents) == 288, "superblock");
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

/* Slots that a store of that many blocks is made with: a function of N alone. Pages that always may exist; map leaves for twice as
 * many blocks as the device has, with directories; copies that a checkpoint makes while the old ones are needed; the slot tree's. */
static inline uint64_t format_spare_slots(uint64_t device_blocks)
{
    uint64_t pages = device_blocks / 1024 + device_blocks / 256 + device_blocks / 256;
    uint64_t tables = device_blocks / FORMAT_GROUP_BLOCKS / FORMAT_GROUPS_PER_PAGE; /* each may be written by each checkpoint */
    return (pages < 16384 ? pages : 16384) + 128 + tables;
}

static inline uint64_t format_fixed_pages(uint64_t device_blocks) /* all but the map's */
{
    uint64_t refs = (device_blocks + FORMAT_REFS_PER_PAGE - 1) / FORMAT_REFS_PER_PAGE;
    uint64_t prints = (device_blocks + FORMAT_PRINTS_PER_PAGE - 1) / FORMAT_PRINTS_PER_PAGE;
    uint64_t groups = (refs + FORMAT_GROUPS_PER_PAGE - 1) / FORMAT_GROUPS_PER_PAGE;
    return FORMAT_VOLUME_PAGES + 1 + refs + refs / 255 + 4 + prints + prints / 255 + 4 + groups + groups / 255 + 2;
}

static inline uint64_t format_slots(uint64_t device_blocks)
{
    uint64_t map = device_blocks / 256 + device_blocks / 4096 + 48;
    uint64_t slots = format_fixed_pages(device_blocks) + map + format_spare_slots(device_blocks);
    slots += (slots / FORMAT_SLOTS_PER_PAGE + 1) * FORMAT_SLOTS_RESERVED;
    return (slots + 63) / 64 * 64;
}

#endif
