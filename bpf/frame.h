/* SPDX-License-Identifier: GPL-2.0-only */
/* One frame under way: what is known of it, and how it is counted. */
#ifndef FRAME_H
#define FRAME_H

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/pkt_cls.h>
#include <stdbool.h>
#include <stddef.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "maps.h"

#define ETH_SIZE 14
#define VLAN_MASK 0x0fff

struct frame {
	struct __sk_buff *skb;
	struct network *network;
	struct counters *counters; /* of the link that it came in by; NULL where there are none */
	struct where to;           /* where.net is the network that it is in */
	union address from;
	__u8 from_mac[6];
	__u16 vlan;
	__u32 from_flags, from_group;
	__u16 from_port, to_port; /* network byte order; 0 where there are none */
	__u16 l4;                 /* offset of what follows the IP headers */
	__u8 family;              /* 4 or 6 */
	__u8 protocol;
	__u8 icmp; /* type, of ICMP and ICMPv6 */
	__u8 hops; /* TTL, or hop limit */
	bool fragmented, later; /* a fragment; one that is not the first */
	bool traced;
	__u64 now;      /* nanoseconds since boot */
	__u32 fragment; /* identification */
	__u32 rule;     /* number of the rule that decided, from 1 */
};

/* Whether the first `size` bytes can be read directly; pointers into the frame are void afterwards. */
static __always_inline bool readable(struct __sk_buff *skb, __u32 size)
{
	if ((void *)(long)skb->data + size <= (void *)(long)skb->data_end)
		return true;
	return skb->len >= size && bpf_skb_pull_data(skb, size) == 0;
}

static __always_inline bool same_mac(const __u8 *a, const __u8 *b)
{
	return a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3] && a[4] == b[4] && a[5] == b[5];
}

static __always_inline bool same_address(const union address *a, const union address *b)
{
	return a->half[0] == b->half[0] && a->half[1] == b->half[1];
}

static __always_inline bool is_unspecified(const union address *a)
{
	return !(a->half[0] | a->half[1]);
}

static __always_inline bool is_link_local(const union address *a)
{
	return a->byte[0] == 0xfe && (a->byte[1] & 0xc0) == 0x80;
}

static __always_inline void set_ipv4(union address *to, __u32 address)
{
	to->half[0] = 0;
	to->word[2] = bpf_htonl(0xffff);
	to->word[3] = address;
}

static __always_inline int tell(struct frame *f, __u32 fate, __u32 reason, __u32 ifindex, int action)
{
	if (f->traced) {
		__u32 zero = 0;
		struct verdict *verdict = bpf_map_lookup_elem(&verdicts, &zero);

		if (verdict) {
			verdict->fate = fate;
			verdict->reason = reason;
			verdict->ifindex = ifindex;
			verdict->rule = f->rule;
		}
	}
	return action;
}

static __always_inline int drop(struct frame *f, __u32 reason)
{
	if (f->counters && !f->traced && reason < REASONS)
		f->counters->dropped[reason]++;
	return tell(f, FATE_DROP, reason, 0, TC_ACT_SHOT);
}

/* The frame has passed what looks at its sender. */
static __always_inline void count_sent(struct frame *f)
{
	if (f->counters && !f->traced) {
		f->counters->tx_packets++;
		f->counters->tx_bytes += f->skb->len;
		f->counters->last_seen = f->now;
	}
}

static __always_inline struct counters *counters_at(__u32 slot)
{
	return bpf_map_lookup_elem(&counters_of, &slot);
}

/* The frame goes to the link with that slot (0: to none that counts), to whom has the MAC `to`. */
static __always_inline void count_received(struct frame *f, __u32 slot, const __u8 *to)
{
	struct pair pair = {};
	struct counters *counters;
	struct traffic *traffic;

	if (f->traced)
		return;
	counters = slot ? counters_at(slot) : NULL;
	if (counters) {
		counters->rx_packets++;
		counters->rx_bytes += f->skb->len;
	}
	__builtin_memcpy(pair.from, f->from_mac, 6);
	__builtin_memcpy(pair.to, to, 6);
	traffic = bpf_map_lookup_elem(&pairs, &pair);
	if (traffic) {
		traffic->packets++;
		traffic->bytes += f->skb->len;
		traffic->last_seen = f->now;
	} else {
		struct traffic first = { 1, f->skb->len, f->now };

		bpf_map_update_elem(&pairs, &pair, &first, BPF_ANY);
	}
}

#endif
