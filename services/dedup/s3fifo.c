/* See s3fifo.h. Both queues are circular lists through a sentinel; the ghost is a circular array of keys with a hash. */
#include "services/dedup/s3fifo.h"

#include <assert.h>
#include <stdlib.h>

/* The small queue's share of the pages. */
#define SMALL_PART 10

enum { OUTSIDE = 0, SMALL = 1, MAIN = 2 };

struct page {
    uint64_t key;
    uint32_t older, newer; /* in its queue */
};

struct ghost {
    uint64_t key;
    uint32_t next;         /* in its bucket */
    bool present;
};

struct s3fifo {
    uint32_t page_count, small_share, small_count, main_count;
    struct page *pages;    /* and a sentinel for each queue: its `newer` is the oldest page, its `older` the newest */
    uint8_t *queue_of;     /* per page */
    bool *used;            /* per page: apart, so that a use finds it in a near cache */
    struct ghost *ghosts;
    uint32_t ghost_count, ghost_hand; /* the hand is at the oldest */
    uint32_t *heads, mask; /* buckets of ghosts */
};

static uint32_t sentinel(const struct s3fifo *queues, uint32_t queue) { return queues->page_count + queue - SMALL; }

static uint32_t *count_of(struct s3fifo *queues, uint32_t queue)
{
    return queue == SMALL ? &queues->small_count : &queues->main_count;
}

struct s3fifo *s3fifo_open(uint32_t page_count)
{
    struct s3fifo *queues = calloc(1, sizeof *queues);
    uint32_t buckets = 1;
    assert(page_count != 0 && page_count < UINT32_MAX / 2);
    if (queues == 0)
        return 0;
    queues->page_count = page_count;
    queues->small_share = page_count / SMALL_PART != 0 ? page_count / SMALL_PART : 1;
    queues->ghost_count = page_count > queues->small_share ? page_count - queues->small_share : 1;
    while (buckets < queues->ghost_count)
        buckets *= 2;
    queues->mask = buckets - 1;
    queues->pages = calloc(page_count + 2, sizeof *queues->pages);
    queues->queue_of = calloc(page_count, sizeof *queues->queue_of);
    queues->used = calloc(page_count, sizeof *queues->used);
    queues->ghosts = calloc(queues->ghost_count, sizeof *queues->ghosts);
    queues->heads = malloc(buckets * sizeof *queues->heads);
    if (queues->pages == 0 || queues->queue_of == 0 || queues->used == 0 || queues->ghosts == 0 || queues->heads == 0) {
        s3fifo_close(queues);
        return 0;
    }
    for (uint32_t bucket = 0; bucket < buckets; bucket++)
        queues->heads[bucket] = S3FIFO_NONE;
    for (uint32_t queue = SMALL; queue <= MAIN; queue++)
        queues->pages[sentinel(queues, queue)].older = queues->pages[sentinel(queues, queue)].newer = sentinel(queues, queue);
    return queues;
}

void s3fifo_close(struct s3fifo *queues)
{
    if (queues == 0)
        return;
    free(queues->pages);
    free(queues->queue_of);
    free(queues->used);
    free(queues->ghosts);
    free(queues->heads);
    free(queues);
}

/* --- Ghosts ----------------------------------------------------------------------------------------------------------- */

static uint32_t *bucket_of(const struct s3fifo *queues, uint64_t key)
{
    return &queues->heads[(uint32_t)(key * 0x9e3779b97f4a7c15u >> 32) & queues->mask];
}

void s3fifo_prefetch(const struct s3fifo *queues, uint64_t key) { __builtin_prefetch(bucket_of(queues, key)); }

/* The link that leads to the key's ghost, or to S3FIFO_NONE. */
static uint32_t *find_ghost(const struct s3fifo *queues, uint64_t key)
{
    uint32_t *link = bucket_of(queues, key);
    while (*link != S3FIFO_NONE && queues->ghosts[*link].key != key)
        link = &queues->ghosts[*link].next;
    return link;
}

static void unlink_ghost(struct s3fifo *queues, uint32_t *link)
{
    struct ghost *ghost = &queues->ghosts[*link];
    ghost->present = false;
    *link = ghost->next;
}

static void add_ghost(struct s3fifo *queues, uint64_t key)
{
    uint32_t place = queues->ghost_hand;
    struct ghost *ghost = &queues->ghosts[place];
    queues->ghost_hand = place + 1 == queues->ghost_count ? 0 : place + 1;
    if (ghost->present)
        unlink_ghost(queues, find_ghost(queues, ghost->key));
    uint32_t *head = bucket_of(queues, key);
    *ghost = (struct ghost){.key = key, .next = *head, .present = true};
    *head = place;
}

/* --- Queues ------------------------------------------------------------------------------------------------------------- */

static void remove_page(struct s3fifo *queues, uint32_t number)
{
    struct page *page = &queues->pages[number];
    assert(number < queues->page_count && queues->queue_of[number] != OUTSIDE);
    queues->pages[page->older].newer = page->newer;
    queues->pages[page->newer].older = page->older;
    --*count_of(queues, queues->queue_of[number]);
    queues->queue_of[number] = OUTSIDE;
}

static void add_newest(struct s3fifo *queues, uint32_t number, uint32_t queue)
{
    struct page *page = &queues->pages[number], *end = &queues->pages[sentinel(queues, queue)];
    assert(number < queues->page_count && queues->queue_of[number] == OUTSIDE);
    page->older = end->older;
    page->newer = sentinel(queues, queue);
    queues->pages[page->older].newer = number;
    end->older = number;
    queues->queue_of[number] = (uint8_t)queue;
    ++*count_of(queues, queue);
}

void s3fifo_enter(struct s3fifo *queues, uint32_t page, uint64_t key)
{
    uint32_t *link = find_ghost(queues, key);
    bool known = *link != S3FIFO_NONE;
    if (known)
        unlink_ghost(queues, link);
    queues->pages[page].key = key;
    queues->used[page] = false;
    add_newest(queues, page, known ? MAIN : SMALL);
}

void s3fifo_leave(struct s3fifo *queues, uint32_t page) { remove_page(queues, page); }

void s3fifo_use(struct s3fifo *queues, uint32_t page) { queues->used[page] = true; }

bool s3fifo_used(const struct s3fifo *queues, uint32_t page) { return queues->used[page]; }

uint32_t s3fifo_candidate(const struct s3fifo *queues, const struct s3fifo_busy *busy)
{
    bool in_small = queues->small_count > busy->in_small, in_main = queues->main_count > busy->in_main;
    bool small = in_small && (queues->small_count >= queues->small_share || !in_main);
    if (!in_small && !in_main)
        return S3FIFO_NONE;
    return queues->pages[sentinel(queues, small ? SMALL : MAIN)].newer;
}

void s3fifo_keep(struct s3fifo *queues, uint32_t page)
{
    queues->used[page] = false;
    remove_page(queues, page);
    add_newest(queues, page, MAIN);
}

void s3fifo_pass(struct s3fifo *queues, uint32_t page, struct s3fifo_busy *busy)
{
    uint32_t queue = queues->queue_of[page];
    ++*(queue == SMALL ? &busy->in_small : &busy->in_main);
    remove_page(queues, page);
    add_newest(queues, page, queue);
}

void s3fifo_evict(struct s3fifo *queues, uint32_t page)
{
    bool small = queues->queue_of[page] == SMALL;
    remove_page(queues, page);
    if (small)
        add_ghost(queues, queues->pages[page].key);
}

uint32_t s3fifo_small_count(const struct s3fifo *queues) { return queues->small_count; }
uint32_t s3fifo_main_count(const struct s3fifo *queues) { return queues->main_count; }
