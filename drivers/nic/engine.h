/*
 * The operations that nic performs on sockets, and their two engines.
 *
 *   room       operations of any kind that can still be started in this turn
 *   receive, send, accept, close, drain     start one; it runs in `flush`
 *   flush      runs all that were started; fills nic->outcomes, returns how many
 *   retire     the outcomes are applied and committed
 *   watch      the connection's readiness is to be seen by epoll; shut down its sending side if hint.want_shutdown
 *   open       attaches; true if sockets of earlier incarnations are still there
 *
 * engine_uring: sockets lie in the file table of an io_uring that init holds. They survive, and the completion queue keeps the
 * outcome of each operation for the successor.
 * engine_sockets: plain descriptors and system calls; what the process had open dies with it.
 *
 * After a crash: see nic.h; `open` of engine_uring leaves the predecessor's outcomes to be had by `flush`.
 */
#ifndef ATOLL_NIC_ENGINE_H
#define ATOLL_NIC_ENGINE_H

#include "drivers/nic/nic.h"

struct nic_engine {
    int (*open)(struct nic *nic, const struct atoll_uring_parameters *parameters, char *error);
    void (*close)(struct nic *nic);
    uint32_t (*room)(struct nic *nic);
    void (*receive)(struct nic *nic, uint32_t connection, struct iovec *vectors, uint32_t count, uint64_t user_data);
    void (*send)(struct nic *nic, uint32_t connection, struct iovec *vectors, uint32_t count, uint64_t user_data);
    void (*accept)(struct nic *nic, uint32_t connection, int listener, uint64_t user_data);
    void (*close_socket)(struct nic *nic, uint32_t connection, uint64_t user_data);
    void (*drain)(struct nic *nic, uint32_t connection, uint64_t user_data);
    void (*watch)(struct nic *nic, uint32_t connection, uint64_t user_data);
    uint32_t (*flush)(struct nic *nic);
    void (*retire)(struct nic *nic);
};

extern const struct nic_engine nic_engine_uring;
extern const struct nic_engine nic_engine_sockets;

/* Registers a descriptor of the connection's socket with epoll, and shuts it down if that is wanted. */
void nic_watch_descriptor(struct nic *nic, uint32_t connection, int fd);

/* user_data: kind << 56 | connection << 40 | sequence. */
static inline uint64_t nic_user_data(uint32_t kind, uint32_t connection, uint32_t sequence)
{
    return (uint64_t)kind << 56 | (uint64_t)connection << 40 | sequence;
}

/* epoll's data: what became ready. */
#define NIC_READY_LISTENER 0x100000000u
#define NIC_READY_EVENTFD 0x200000000u
#define NIC_READY_RING 0x300000000u

#endif
