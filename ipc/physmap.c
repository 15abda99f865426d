/* See physmap.h. */
#define _GNU_SOURCE
#include "ipc/physmap.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

struct view {
    uint64_t bytes;
    int writable;
};

/* What this process has mapped; a child inherits the table, and with `forget` below the holes. */
static struct view arenas[ATOLL_ROLE_COUNT], locks[ATOLL_ROLE_COUNT];

static uint64_t lock_address(uint32_t role) { return ATOLL_LOCK_BASE + (uint64_t)role * ATOLL_PAGE_BYTES; }

static int map_view(struct view *view, uint64_t at, int fd, uint64_t bytes, int writable, char *error)
{
    int flags = MAP_SHARED | (view->bytes != 0 ? MAP_FIXED : MAP_FIXED_NOREPLACE);
    void *address = (void *)(uintptr_t)at;

    if (view->bytes > bytes && munmap((char *)address + bytes, view->bytes - bytes) != 0) {
        int number = errno;
        snprintf(error, 256, "cannot shorten the map at %#llx: %s", (unsigned long long)at, strerror(number));
        return -number;
    }
    if (view->bytes != 0 && view->bytes < bytes) { /* grown: what is behind the old view may be somebody else's */
        if (munmap(address, view->bytes) != 0)
            return -errno;
        view->bytes = 0;
        flags = MAP_SHARED | MAP_FIXED_NOREPLACE;
    }
    void *mapped = mmap(address, bytes, PROT_READ | (writable ? PROT_WRITE : 0), flags, fd, 0);
    if (mapped == MAP_FAILED || mapped != address) {
        int number = mapped == MAP_FAILED ? errno : EEXIST; /* before Linux 4.17 the flag is a hint */
        if (mapped != MAP_FAILED)
            munmap(mapped, bytes);
        snprintf(error, 256, "cannot map %llu bytes at %#llx %s: %s", (unsigned long long)bytes, (unsigned long long)at,
                 writable ? "writable" : "read-only", strerror(number));
        return -number;
    }
    *view = (struct view){.bytes = bytes, .writable = writable};
    if (madvise(address, bytes, MADV_DONTDUMP) != 0 || (writable && madvise(address, bytes, MADV_DONTFORK) != 0)) {
        int number = errno;
        snprintf(error, 256, "madvise of the map at %#llx: %s", (unsigned long long)at, strerror(number));
        return -number;
    }
    return 0;
}

static int unmap_view(struct view *view, uint64_t at, char *error)
{
    if (view->bytes != 0 && munmap((void *)(uintptr_t)at, view->bytes) != 0) {
        int number = errno;
        snprintf(error, 256, "cannot unmap %#llx: %s", (unsigned long long)at, strerror(number));
        return -number;
    }
    *view = (struct view){0};
    return 0;
}

static int check_role(uint32_t role, char *error)
{
    if (role > 0 && role < ATOLL_ROLE_COUNT)
        return 0;
    snprintf(error, 256, "no role has number %u", role);
    return -EINVAL;
}

/* A writable view of the parent's is a hole in a child: nothing to replace. */
static void forget(struct view *view, uint64_t at)
{
    unsigned char resident;
    if (view->writable && mincore((void *)(uintptr_t)at, ATOLL_PAGE_BYTES, &resident) != 0 && errno == ENOMEM)
        *view = (struct view){0};
}

int atoll_map_arena(uint32_t role, int fd, uint64_t bytes, int writable, char *error)
{
    if (check_role(role, error) != 0)
        return -EINVAL;
    if (bytes == 0 || bytes % ATOLL_PAGE_BYTES != 0 || bytes > ATOLL_MAP_STRIDE) {
        snprintf(error, 256, "an arena cannot have %llu bytes", (unsigned long long)bytes);
        return -EINVAL;
    }
    forget(&arenas[role], atoll_arena_address(role));
    return map_view(&arenas[role], atoll_arena_address(role), fd, bytes, writable, error);
}

int atoll_unmap_arena(uint32_t role, char *error)
{
    if (check_role(role, error) != 0)
        return -EINVAL;
    forget(&arenas[role], atoll_arena_address(role));
    return unmap_view(&arenas[role], atoll_arena_address(role), error);
}

uint64_t atoll_mapped_bytes(uint32_t role)
{
    if (role >= ATOLL_ROLE_COUNT)
        return 0;
    forget(&arenas[role], atoll_arena_address(role));
    return arenas[role].bytes;
}

int atoll_mapped_writable(uint32_t role) { return atoll_mapped_bytes(role) != 0 && arenas[role].writable; }

int atoll_populate_arena(uint32_t role, char *error)
{
    uint64_t mapped = atoll_mapped_bytes(role);
    if (mapped == 0) {
        snprintf(error, 256, "the arena of role %u is not mapped", role);
        return -EINVAL;
    }
    const struct atoll_arena_header *header = (const void *)(uintptr_t)atoll_arena_address(role);
    uint64_t bytes = header->buffer_offset; /* another process wrote it: checked */
    if (bytes == 0 || bytes > mapped || bytes % ATOLL_PAGE_BYTES != 0)
        bytes = mapped;
    if (madvise((void *)(uintptr_t)atoll_arena_address(role), bytes, MADV_POPULATE_READ) != 0 && errno != EINVAL) {
        int number = errno; /* EINVAL: before Linux 5.14; only slower */
        snprintf(error, 256, "cannot populate the arena of role %u: %s", role, strerror(number));
        return -number;
    }
    return 0;
}

int atoll_map_lock(uint32_t role, int fd, int writable, char *error)
{
    if (check_role(role, error) != 0)
        return -EINVAL;
    forget(&locks[role], lock_address(role));
    return map_view(&locks[role], lock_address(role), fd, ATOLL_PAGE_BYTES, writable, error);
}

int atoll_unmap_lock(uint32_t role, char *error)
{
    if (check_role(role, error) != 0)
        return -EINVAL;
    forget(&locks[role], lock_address(role));
    return unmap_view(&locks[role], lock_address(role), error);
}

void *atoll_map_elsewhere(int fd, uint64_t bytes, char *error)
{
    void *mapped = mmap(0, bytes, PROT_READ, MAP_SHARED, fd, 0);
    if (mapped == MAP_FAILED) {
        snprintf(error, 256, "cannot map %llu bytes: %s", (unsigned long long)bytes, strerror(errno));
        return 0;
    }
    (void)madvise(mapped, bytes, MADV_DONTDUMP);
    return mapped;
}

int atoll_unmap_elsewhere(void *address, uint64_t bytes) { return munmap(address, bytes) == 0 ? 0 : -errno; }

uint64_t atoll_make_huge(int fd, uint64_t bytes)
{
    uint64_t whole = bytes - bytes % ATOLL_HUGE_BYTES, done = 0;
    char *room, *at;
    if (whole == 0)
        return 0;
    room = mmap(0, whole + ATOLL_HUGE_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0); /* to find an aligned place */
    if (room == MAP_FAILED)
        return 0;
    at = room + (-(uintptr_t)room & (ATOLL_HUGE_BYTES - 1));
    if (mmap(at, whole, PROT_READ, MAP_SHARED | MAP_FIXED, fd, 0) != MAP_FAILED)
        /* A huge page takes the place of at least one small one. The first refusal (old system, memory in pieces) is the last. */
        while (done < whole && posix_fallocate(fd, (off_t)done, ATOLL_PAGE_BYTES) == 0 &&
               madvise(at + done, ATOLL_HUGE_BYTES, MADV_COLLAPSE) == 0)
            done += ATOLL_HUGE_BYTES;
    munmap(room, whole + ATOLL_HUGE_BYTES);
    return done;
}
