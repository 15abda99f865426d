/*
 * Requests of the transmission phase: decoding, the protocol's rules, and the words for their errors. No state.
 *
 * Each rule is checked once, here, and has its own text; what nbd_validate lets through needs no further check.
 */
#include <inttypes.h>
#include <stdio.h>

#include "services/nbd/nbd.h"

int nbd_parse(const uint8_t *header, uint32_t features, struct nbd_request *request)
{
    int extended = (features & NBD_FEATURE_EXTENDED) != 0;
    if (nbd_load32(header) != (extended ? NBD_EXTENDED_REQUEST_MAGIC : NBD_REQUEST_MAGIC))
        return -1;
    request->flags = nbd_load16(header + 4);
    request->type = nbd_load16(header + 6);
    request->cookie = nbd_load64(header + 8);
    request->offset = nbd_load64(header + 16);
    request->length = extended ? nbd_load64(header + 24) : nbd_load32(header + 24);
    request->has_payload = extended ? (request->flags & NBD_CMD_FLAG_PAYLOAD_LEN) != 0 : request->type == NBD_CMD_WRITE;
    return 0;
}

struct rule {
    const char *name;
    uint16_t flags;      /* that the command may carry */
    uint8_t has_range;   /* offset and length are a range of the volume; else both are 0 */
    uint8_t modifies;
    uint8_t moves_data;  /* length is bounded by the largest payload */
    uint8_t past_end;    /* status of a range past the end */
};

/* FUA is valid for all commands (section "Command flags"); where nothing is written it changes nothing. */
static const struct rule RULES[] = {
    [NBD_CMD_READ] = {"READ", NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_DF, 1, 0, 1, ATOLL_EINVAL},
    [NBD_CMD_WRITE] = {"WRITE", NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_PAYLOAD_LEN, 1, 1, 1, ATOLL_ENOSPC},
    [NBD_CMD_DISC] = {"DISC", 0xffff, 0, 0, 0, ATOLL_OK},
    [NBD_CMD_FLUSH] = {"FLUSH", NBD_CMD_FLAG_FUA, 0, 0, 0, ATOLL_OK},
    [NBD_CMD_TRIM] = {"TRIM", NBD_CMD_FLAG_FUA, 1, 1, 0, ATOLL_EINVAL},
    [NBD_CMD_CACHE] = {"CACHE", NBD_CMD_FLAG_FUA, 1, 0, 0, ATOLL_EINVAL},
    [NBD_CMD_WRITE_ZEROES] = {"WRITE_ZEROES", NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO, 1, 1, 0, ATOLL_ENOSPC},
    [NBD_CMD_BLOCK_STATUS] = {"BLOCK_STATUS", NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_REQ_ONE, 1, 0, 0, ATOLL_EINVAL},
};
#define RULE_COUNT (sizeof RULES / sizeof RULES[0])

const char *nbd_command_name(uint32_t type) { return type < RULE_COUNT ? RULES[type].name : "unknown command"; }

#define REFUSE(status, ...)                                                                                                      \
    do {                                                                                                                         \
        snprintf(text, NBD_TEXT_BYTES, __VA_ARGS__);                                                                             \
        return (status);                                                                                                         \
    } while (0)

int nbd_validate(const struct nbd_request *request, uint32_t features, uint64_t size_bytes, int read_only,
                 const char *volume_name, char *text)
{
    int extended = (features & NBD_FEATURE_EXTENDED) != 0;
    int chunks = (features & (NBD_FEATURE_STRUCTURED | NBD_FEATURE_EXTENDED)) != 0;

    text[0] = 0;
    if (request->type >= RULE_COUNT)
        REFUSE(ATOLL_EINVAL, "command %u is not known to this server", request->type);
    const struct rule *rule = &RULES[request->type];
    if (request->type == NBD_CMD_DISC)
        return ATOLL_OK; /* it has no reply that could carry an error */
    uint32_t allowed = rule->flags;
    if (!extended)
        allowed &= ~(uint32_t)NBD_CMD_FLAG_PAYLOAD_LEN;
    if (!chunks)
        allowed &= ~(uint32_t)NBD_CMD_FLAG_DF;
    if (request->flags & ~allowed)
        REFUSE(ATOLL_EINVAL, "%s does not take command flags 0x%04x (of 0x%04x sent; 0x%04x are allowed on this connection)",
               rule->name, request->flags & ~allowed, request->flags, allowed);
    if (request->type == NBD_CMD_WRITE && !request->has_payload)
        REFUSE(ATOLL_EINVAL, "WRITE with extended headers needs flag PAYLOAD_LEN");
    if (!rule->has_range) {
        if (request->offset != 0 || request->length != 0)
            REFUSE(ATOLL_EINVAL, "%s takes no range, but offset %" PRIu64 " and length %" PRIu64 " were sent", rule->name,
                   request->offset, request->length);
        return ATOLL_OK;
    }
    if (request->type == NBD_CMD_BLOCK_STATUS && !(chunks && (features & NBD_FEATURE_ALLOCATION)))
        REFUSE(ATOLL_EINVAL, "BLOCK_STATUS needs structured replies and metadata context base:allocation, negotiated for this export");
    if (request->length == 0)
        REFUSE(ATOLL_EINVAL, "%s of length 0 at offset %" PRIu64, rule->name, request->offset);
    if (rule->modifies && read_only)
        REFUSE(ATOLL_EPERM, "%s at offset %" PRIu64 ": volume \"%s\" is read-only", rule->name, request->offset, volume_name);
    uint32_t longest = features & NBD_FEATURE_UNTOLD ? ATOLL_REQUEST_BYTES : ATOLL_PAYLOAD_BYTES;
    if (rule->moves_data && request->length > longest)
        REFUSE(request->type == NBD_CMD_READ && chunks ? ATOLL_EOVERFLOW : ATOLL_EINVAL,
               "%s of %" PRIu64 " bytes is over the limit of %u bytes for one request", rule->name, request->length,
               longest);
    if (request->offset > size_bytes || request->length > size_bytes - request->offset)
        REFUSE(rule->past_end, "%s of %" PRIu64 " bytes at offset %" PRIu64 " goes past the end of volume \"%s\" (%" PRIu64 " bytes)",
               rule->name, request->length, request->offset, volume_name, size_bytes);
    if ((request->flags & NBD_CMD_FLAG_DF) &&
        request->length > nbd_part_bytes(request->offset, request->length, 0, ATOLL_PART_BYTES))
        REFUSE(ATOLL_EOVERFLOW, "READ of %" PRIu64 " bytes at offset %" PRIu64 " cannot be sent in one chunk (flag DF): the limit is %d bytes from the first block on",
               request->length, request->offset, ATOLL_PART_BYTES);
    return ATOLL_OK;
}

uint32_t nbd_code(uint32_t status)
{
    switch (status) {
    case ATOLL_EPERM: return NBD_EPERM;
    case ATOLL_EINVAL: return NBD_EINVAL;
    case ATOLL_ENOSPC: return NBD_ENOSPC;
    case ATOLL_ENOTSUP: return NBD_ENOTSUP;
    case ATOLL_ESHUTDOWN:
    case ATOLL_ENOENT: return NBD_ESHUTDOWN; /* the volume is no more: the client must disconnect */
    case ATOLL_ENOMEM: return NBD_ENOMEM;
    case ATOLL_EOVERFLOW: return NBD_EOVERFLOW;
    default: return NBD_EIO; /* EIO, ECORRUPT, EPOISON, EUNFLUSHED, and what no list names */
    }
}

void nbd_explain(const struct nbd_slot *slot, uint32_t status, uint64_t place, uint64_t offset, const char *volume_name, char *text)
{
    char why[96];
    if ((status == ATOLL_ECORRUPT || status == ATOLL_EIO) && place >= ATOLL_METADATA_PLACE)
        snprintf(why, sizeof why, "a page of metadata cannot be had from either copy (page %#" PRIx64 ")", place);
    else switch (status) {
    case ATOLL_EPERM: snprintf(why, sizeof why, "the volume is read-only"); break;
    case ATOLL_EIO: snprintf(why, sizeof why, "the device failed (address %" PRIu64 ")", place); break;
    case ATOLL_EINVAL: snprintf(why, sizeof why, "the request does not fit the volume"); break;
    case ATOLL_ENOSPC: snprintf(why, sizeof why, "the store is full"); break;
    case ATOLL_ENOTSUP: snprintf(why, sizeof why, "it cannot be done fast"); break;
    case ATOLL_ESHUTDOWN: snprintf(why, sizeof why, "the server stops"); break;
    case ATOLL_ENOENT: snprintf(why, sizeof why, "the volume was deleted"); break;
    case ATOLL_ECORRUPT: snprintf(why, sizeof why, "the stored data do not match their checksum (address %" PRIu64 ")", place); break;
    case ATOLL_EPOISON: snprintf(why, sizeof why, "the request made a part of the server crash twice and is refused"); break;
    case ATOLL_ENOMEM: snprintf(why, sizeof why, "a limit of the server is reached"); break;
    case ATOLL_EOVERFLOW: snprintf(why, sizeof why, "it is too large"); break;
    case ATOLL_EUNFLUSHED: snprintf(why, sizeof why, "an acknowledged write could not be stored yet (address %" PRIu64 ")", place); break;
    default: snprintf(why, sizeof why, "an error inside the server (status %u)", status); break;
    }
    if (slot->length == 0)
        snprintf(text, NBD_TEXT_BYTES, "%s of volume \"%s\": %s", nbd_command_name(slot->type), volume_name, why);
    else
        snprintf(text, NBD_TEXT_BYTES, "%s of %" PRIu64 " bytes at offset %" PRIu64 " of volume \"%s\", at LBA %" PRIu64 ": %s",
                 nbd_command_name(slot->type), slot->length, slot->offset, volume_name,
                 offset >> ATOLL_BLOCK_SHIFT, why);
}

uint64_t nbd_part_bytes(uint64_t offset, uint64_t work_bytes, uint64_t done_bytes, uint64_t unit)
{
    uint64_t lead = offset % ATOLL_BLOCK_BYTES;
    uint64_t end = ((lead + done_bytes) / unit + 1) * unit - lead; /* relative to `offset` */
    return (end < work_bytes ? end : work_bytes) - done_bytes;
}
