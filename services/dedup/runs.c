/* The run matcher; see runs.h. Time: blocks * places * track length at worst, in practice one place and one chain. */
#include "services/dedup/runs.h"

#include <assert.h>
#include <stdbool.h>

#include "ipc/limits.h"

_Static_assert(RUNS_BLOCKS == ATOLL_IO_BLOCKS, "a run is at most one I/O request");
_Static_assert(ATOLL_THRESHOLD_MAX <= RUNS_BLOCKS, "a run can reach every threshold");

/* The best choice for a prefix, and the piece that ends it. */
struct prefix {
    uint32_t shared, pieces, joins;
    uint64_t squares;   /* sum of the pieces' lengths squared: larger where one is longer */
    uint32_t from;      /* the piece is [from, end) */
    uint8_t place;      /* of its first block; RUNS_NONE: one unshared block */
    uint64_t next;      /* the place that would go on in sequence; 0: none (place 0 is never data) */
};

static bool follows(const struct runs_rule *rule, uint64_t place, uint64_t next)
{
    return next == place + 1 && next / rule->track_blocks == place / rule->track_blocks;
}

static uint8_t find(const struct runs_block *block, uint64_t place)
{
    for (uint32_t index = 0; index < block->count; index++)
        if (block->places[index] == place)
            return (uint8_t)index;
    return RUNS_NONE;
}

static bool better(const struct prefix *a, const struct prefix *b)
{
    if (a->shared != b->shared)
        return a->shared > b->shared;
    if (a->pieces != b->pieces)
        return a->pieces < b->pieces;
    if (a->squares != b->squares)
        return a->squares > b->squares;
    return a->joins > b->joins;
}

/* Nothing to choose: no block has two places, and none is too few. Most runs where the threshold is 1 are like that. */
static bool match_forced(const struct runs_block *blocks, uint32_t count, const struct runs_rule *rule, uint8_t *choice)
{
    if (rule->threshold != 1)
        return false;
    for (uint32_t index = 0; index < count; index++) {
        if (blocks[index].count > 1)
            return false;
        choice[index] = blocks[index].count == 1 ? 0 : RUNS_NONE;
    }
    return true;
}

void runs_match(const struct runs_block *blocks, uint32_t count, const struct runs_rule *rule, uint8_t *choice)
{
    struct prefix best[RUNS_BLOCKS + 1];
    bool known[RUNS_BLOCKS + 1] = {true};
    assert(count >= 1 && count <= RUNS_BLOCKS && rule->threshold >= 1 && rule->track_blocks >= 1);
    if (match_forced(blocks, count, rule, choice))
        return;
    best[0] = (struct prefix){.place = RUNS_NONE, .next = rule->before.length != 0 ? rule->before.place + 1 : 0};

    for (uint32_t from = 0; from < count; from++) {
        const struct prefix *prefix = &best[from]; /* final: pieces only lead forward */
        struct prefix unshared = *prefix;
        unshared.from = from;
        unshared.place = RUNS_NONE;
        unshared.next = 0;
        if (!known[from + 1] || better(&unshared, &best[from + 1])) {
            best[from + 1] = unshared;
            known[from + 1] = true;
        }
        for (uint32_t each = 0; each < blocks[from].count; each++) {
            uint64_t start = blocks[from].places[each];
            uint32_t lead = from == 0 && rule->before.length != 0 && follows(rule, rule->before.place, start) ? rule->before.length : 0;
            bool all_free = true;
            uint8_t at = (uint8_t)each;
            for (uint32_t end = from + 1; end <= count; end++) {
                uint64_t last = start + (end - 1 - from);
                all_free = all_free && (blocks[end - 1].free >> at & 1) != 0;
                uint32_t length = end - from, total = lead + length;
                if (end == count && rule->after.length != 0 && follows(rule, last, rule->after.place))
                    total += rule->after.length;
                if (total >= rule->threshold || all_free) {
                    struct prefix shared = {.shared = prefix->shared + length,
                                            .pieces = prefix->pieces + 1,
                                            .joins = prefix->joins + (start == prefix->next),
                                            .squares = prefix->squares + (uint64_t)length * length,
                                            .from = from,
                                            .place = (uint8_t)each,
                                            .next = last + 1};
                    if (!known[end] || better(&shared, &best[end])) {
                        best[end] = shared;
                        known[end] = true;
                    }
                }
                if (end == count || !follows(rule, last, last + 1) || (at = find(&blocks[end], last + 1)) == RUNS_NONE)
                    break;
            }
        }
    }

    for (uint32_t end = count; end > 0; end = best[end].from) {
        const struct prefix *piece = &best[end];
        for (uint32_t index = piece->from; index < end; index++)
            choice[index] = piece->place == RUNS_NONE
                                ? RUNS_NONE
                                : find(&blocks[index], blocks[piece->from].places[piece->place] + (index - piece->from));
    }
}

uint32_t runs_open_tail(const struct runs_block *blocks, uint32_t count, const struct runs_rule *rule, const uint8_t *choice)
{
    uint32_t longest = 0;
    if (choice[count - 1] != RUNS_NONE)
        return 0;
    for (uint32_t each = 0; each < blocks[count - 1].count; each++) {
        uint64_t place = blocks[count - 1].places[each];
        uint32_t length = 1;
        if (!follows(rule, place, place + 1))
            continue;
        while (length < count && choice[count - 1 - length] == RUNS_NONE && follows(rule, place - length, place - length + 1) &&
               find(&blocks[count - 1 - length], place - length) != RUNS_NONE)
            length++;
        longest = length > longest ? length : longest;
    }
    return longest;
}
