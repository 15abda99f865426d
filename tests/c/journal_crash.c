/* Transactions, killed after each single store, recovered by the parent, compared with the state of the last commit. */
/* link: -DATOLL_STORE_HOOK ipc/domain.c ipc/spin.c */
#define _GNU_SOURCE
#include <signal.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "arena_support.h"

enum { WORDS = 64, STEPS = 12 };

struct world {
    struct atoll_journal journal;
    uint64_t words[WORDS];
    uint32_t halves[WORDS];
    uint64_t committed; /* steps; changed in the transaction itself */
};

static uint64_t stores_left;

void atoll_store_hook(void)
{
    if (stores_left-- == 0)
        kill(getpid(), SIGKILL);
}

/* Step `number` on `world`; by transaction, or plainly if it is the oracle's. */
static void step(struct world *world, uint64_t seed, uint64_t number, bool oracle)
{
    uint64_t random = seed + number * 977;
    next_random(&random);
    uint64_t changes = next_random(&random) % 6;
    for (uint64_t change = 0; change < changes; change++) {
        uint64_t value = next_random(&random), index = next_random(&random) % WORDS;
        switch (next_random(&random) % 3) {
        case 0:
            oracle ? (void)(world->words[index] = value) : atoll_set64(&world->journal, &world->words[index], value);
            break;
        case 1:
            oracle ? (void)(world->halves[index] = (uint32_t)value)
                   : atoll_set32(&world->journal, &world->halves[index], (uint32_t)value);
            break;
        default:
            index = index < WORDS - 4 ? index : WORDS - 4;
            if (!oracle)
                atoll_save(&world->journal, &world->words[index], 32);
            for (uint64_t at = 0; at < 4; at++) {
                *(volatile uint64_t *)&world->words[index + at] = value + at;
                if (!oracle)
                    ATOLL_STORED();
            }
        }
    }
    if (oracle) {
        world->committed = number + 1;
    } else {
        atoll_set64(&world->journal, &world->committed, number + 1);
        atoll_commit(&world->journal);
    }
}

static bool same(const struct world *world, const struct world *oracle)
{
    return memcmp(world->words, oracle->words, sizeof world->words) == 0 &&
           memcmp(world->halves, oracle->halves, sizeof world->halves) == 0 && world->committed == oracle->committed;
}

int main(int argc, char **argv)
{
    uint64_t seed = seed_of(argc, argv), deaths = 0, deaths_in_recovery = 0;
    struct world *world = mmap(0, sizeof *world, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    static struct world oracles[STEPS + 1];
    CHECK(world != MAP_FAILED);

    for (uint64_t number = 0; number < STEPS; number++) {
        memcpy(&oracles[number + 1].words, &oracles[number].words, sizeof *world - offsetof(struct world, words));
        step(&oracles[number + 1], seed, number, true);
    }
    for (uint64_t point = 0;; point++) {
        memset(world, 0, sizeof *world);
        pid_t child = fork();
        CHECK(child >= 0);
        if (child == 0) {
            stores_left = point;
            for (uint64_t number = 0; number < STEPS; number++)
                step(world, seed, number, false);
            _exit(0);
        }
        int status;
        CHECK(waitpid(child, &status, 0) == child);
        if (WIFEXITED(status)) {
            CHECK(same(world, &oracles[STEPS]));
            break;
        }
        CHECK(WTERMSIG(status) == SIGKILL);
        deaths++;
        /* The successor may be killed while it rolls back, too: at each store in turn, until it comes through. */
        for (uint64_t again = point % 3;; again += 3) {
            child = fork();
            if (child == 0) {
                stores_left = again;
                atoll_roll_back(&world->journal);
                _exit(0);
            }
            CHECK(waitpid(child, &status, 0) == child);
            if (WIFEXITED(status))
                break;
            deaths_in_recovery++;
        }
        CHECK(world->journal.count == 0);
        CHECK(world->committed <= STEPS && same(world, &oracles[world->committed]));
    }
    printf("%llu deaths in steps, %llu in recovery\n", (unsigned long long)deaths, (unsigned long long)deaths_in_recovery);
    CHECK(deaths > 100);
    return 0;
}
