/*
 * The physical map: every arena and every lock page at its own fixed address, the same in all domains (I2),
 * read-only but for one's own (I1).
 *
 *   0x200000000000 + role * 256 GiB    arena         atoll_map_arena
 *   0x2f0000000000 + role * 4 KiB      lock page     atoll_map_lock
 *   anywhere                           atoll_map_elsewhere: an old or foreign arena, read-only, for tools
 *
 *   atoll_make_huge                    a new object's memory in huge pages
 *
 * Nothing is mapped over what somebody else put there: only this module's own view is replaced. Every map is kept out
 * of core dumps; a writable one is not inherited by children. One thread at a time.
 *
 * Errors: negative errno, with a text in `error` (256 bytes).
 *
 * After a crash: maps end with their process; the objects stay.
 */
#ifndef ATOLL_IPC_PHYSMAP_H
#define ATOLL_IPC_PHYSMAP_H

#include "ipc/layout.h"

/* cffi:begin */
/* A huge page. Where it is more (arm64 with large pages), there are none. */
#define ATOLL_HUGE_BYTES 2097152
/* Maps `bytes` (page-aligned, at most ATOLL_MAP_STRIDE) of `fd` as the arena of `role`, in place of the view there was. */
int atoll_map_arena(uint32_t role, int fd, uint64_t bytes, int writable, char *error);
int atoll_unmap_arena(uint32_t role, char *error);
/* Bytes mapped now as the arena of `role`, 0: none. */
uint64_t atoll_mapped_bytes(uint32_t role);
/* 1 if the arena of `role` is mapped writable in this process. */
int atoll_mapped_writable(uint32_t role);
/* Makes the page tables for the part of an arena that its owner works in (header to the end of the role area, not the
 * buffers), so that first touches cost nothing later. Not inherited by fork: each standby does it for itself. */
int atoll_populate_arena(uint32_t role, char *error);
int atoll_map_lock(uint32_t role, int fd, int writable, char *error);
int atoll_unmap_lock(uint32_t role, char *error);
/* Read-only, at an address of the system's choice; NULL and `error` if it cannot be. */
void *atoll_map_elsewhere(int fd, uint64_t bytes, char *error);
int atoll_unmap_elsewhere(void *address, uint64_t bytes);
/* Allocates memory of a new object of `bytes` in huge pages, from its beginning on as far as they are to be had; returns how many
 * bytes that is, a multiple of ATOLL_HUGE_BYTES. Before the rest is allocated: it costs less than what it replaces. Each domain touches pages all over the arenas, and
 * the processor remembers the places of few. Works whatever shmem_enabled and the mount of /dev/shm say (Linux 6.1, MADV_COLLAPSE). */
uint64_t atoll_make_huge(int fd, uint64_t bytes);
/* cffi:end */

#endif
