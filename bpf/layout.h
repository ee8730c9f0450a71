/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the dispatcher and the control plane share: the keys and values of the maps.
 *
 * orchestrator/switch/layout.py says the same in Python; tests/unit/test_switch_layout.py holds both together.
 * Whoever changes a struct raises LAYOUT: maps of another layout are never taken over from a running dispatcher.
 */
#ifndef LAYOUT_H
#define LAYOUT_H

#include <linux/bpf.h>
#include <linux/types.h>

#define LAYOUT 2

#define MAX_PORTS 4096     /* NICs of guests of this host */
#define MAX_COUNTED 5120   /* links: NICs, and of each network its gateway link and its VXLAN */
#define MAX_LISTED 65536   /* addresses, those of guests of other hosts too */
#define MAX_NETWORKS 256
#define MAX_LINKS 512
#define MAX_PAIRS 16384
#define MAX_RULES 4096
#define MAX_FLOWS 65536
#define MAX_TRUNKS 65536

/* An address of either family; IPv4 as ::ffff:a.b.c.d (RFC 4291, section 2.5.5.2). */
union address {
	__u8 byte[16];
	__u32 word[4];
	__u64 half[2];
};

/* Flags of `struct nic`, `struct place` and `struct network`. */
enum flag {
	LOCAL = 1 << 0,    /* place: a tap of this host */
	REMOTE = 1 << 1,   /* place: a guest of another host, behind the VXLAN */
	HOST = 1 << 2,     /* place: the host itself, behind the network's gateway */
	ISOLATED = 1 << 3, /* nic, place: talks to nobody but those without a group */
	TRUNK = 1 << 4,    /* nic, place: frames carry a VLAN tag, see `trunks` */
	LIMITED = 1 << 5,  /* nic, place: there is a bucket for this direction */
	UPLINK = 1 << 6,   /* network: what is on no list leaves by an uplink */
	FLOOD = 1 << 7,    /* network: multicast goes to everybody */
	RULES = 1 << 8,    /* network: there are rules */
};

/* `ports`, by the link's index: what the guest behind it may send. */
struct nic {
	__u32 net;    /* index of the network's gateway link */
	__u32 flags;
	__u32 group;  /* 0: none */
	__u32 mirror; /* index of the link that gets a copy of everything; 0: none */
	__u32 ip4;    /* network byte order; 0: none */
	__u16 vlan;   /* of untagged frames; 0: none */
	__u8 mac[6];
	__u32 slot;   /* of `counters_of` */
	union address ip6;        /* ::: none */
	union address link_local; /* fe80::/64 with the modified EUI-64 of the MAC */
};

/* The list: `list`, by network and address. Network 0 is what uplinks see: addresses of all networks with one. */
struct where {
	union address address;
	__u32 net;
	__u32 unused;
};

struct place {
	__u32 net;
	__u32 ifindex; /* a tap, the network's VXLAN or its gateway link */
	__u32 flags;
	__u32 group;
	__u32 mirror;
	__u32 slot; /* of `counters_of`; 0: what goes there is not counted */
	__u16 vlan;
	__u8 mac[6];
};

/* `networks`, by the index of the gateway link. */
struct network {
	__u32 flags;
	__u32 vxlan; /* index; 0: the network is on this host alone */
	__u32 mtu;
	__u32 generation; /* of the rules: what was allowed by earlier ones is looked at again */
	__u32 first_rule;
	__u32 rules;
	__u32 net4, mask4; /* network byte order; mask 0: none */
	union address net6, mask6;
	__u8 gateway[6];
	__u16 slot; /* of `counters_of`: the gateway link's */
};

/* `links`, by index: where else frames come in. */
enum kind { GATEWAY = 1, VXLAN, PHYSICAL };

struct attachment {
	__u32 kind;
	__u32 net;  /* 0 for a physical NIC, which is the uplink of all networks that have one */
	__u32 slot; /* of `counters_of` */
};

/* `known`, by network and MAC: the addresses of a NIC, wherever it is. */
struct owner {
	__u32 net;
	__u8 mac[6];
	__u16 unused;
};

struct addresses {
	union address ip6, link_local;
	__u32 ip4; /* network byte order; 0: none */
	__u32 unused;
};

/* Why a frame was dropped. */
enum reason {
	DROP_SOURCE_MAC,
	DROP_SOURCE_IPV4,
	DROP_SOURCE_IPV6,
	DROP_LINK_LOCAL,
	DROP_ARP,
	DROP_ND,
	DROP_ROUTER,
	DROP_ETHERTYPE,
	DROP_MALFORMED,
	DROP_TOO_BIG,
	DROP_VLAN,
	DROP_MULTICAST,
	DROP_NO_DESTINATION,
	DROP_ISOLATED,
	DROP_RULE,
	DROP_FRAGMENT,
	DROP_RATE,
	DROP_UNDERLAY,
	DROP_NO_PORT,
	REASONS,
};

/* `counters_of`, by the slot that the control plane gives a link, for each CPU. Slot 0 is nobody's. */
struct counters {
	__u64 tx_packets, tx_bytes; /* from the guest */
	__u64 rx_packets, rx_bytes; /* to the guest */
	__u64 answered;             /* ARP requests and neighbour solicitations */
	__u64 last_seen;            /* nanoseconds since boot; of the guest's last frame */
	__u64 dropped[REASONS];
};

/* `pairs`, for each CPU: who sends how much to whom. What has no NIC of its own has the gateway's MAC. */
struct pair {
	__u8 from[6], to[6];
};

struct traffic {
	__u64 packets, bytes;
	__u64 last_seen; /* nanoseconds since boot */
};

/* `trunks`: that a NIC is in a VLAN by tagged frames. */
struct member {
	__u8 mac[6];
	__u16 vlan;
};

/* `buckets`, by link and direction. */
enum direction { FROM_GUEST, TO_GUEST };

struct limited {
	__u32 ifindex;
	__u32 direction;
};

struct bucket {
	__u64 rate;  /* bytes per second */
	__u64 burst; /* bytes */
	__u64 tokens;
	__u64 filled; /* nanoseconds since boot */
	struct bpf_spin_lock lock;
	__u32 unused;
};

/* `rules`, by number: the first that matches decides. */
enum side { ANYONE, PREFIX, NIC, GROUP };

struct party {
	__u32 side;
	__u32 group;
	union address address, mask;
	__u8 mac[6];
	__u16 unused;
};

struct rule {
	struct party from, to;
	__u16 low, high; /* destination ports, host byte order; 0 and 65535: any */
	__u8 protocol;   /* 0: any */
	__u8 allow;
	__u16 family; /* 4, 6; 0: both */
};

/* `flows`: what a rule has allowed, in the direction of its first datagram. */
struct flow {
	union address from, to;
	__u32 net;
	__u32 id;                 /* of a fragment's datagram */
	__u16 from_port, to_port; /* network byte order */
	__u8 protocol;
	__u8 fragment; /* 1: for the later fragments of a datagram that was allowed */
	__u16 unused;
};

struct flow_state {
	__u64 last_seen; /* nanoseconds since boot */
	__u32 generation;
	__u32 unused;
};

/* `verdicts`: what became of a frame that carries TRACE_MARK; it is counted nowhere. */
#define TRACE_MARK 0x6f726374

enum fate { FATE_NONE, FATE_DROP, FATE_GUEST, FATE_UNDERLAY, FATE_HOST, FATE_UPLINK, FATE_ANSWER, FATE_PASS, FATE_FLOOD };

struct verdict {
	__u32 fate;
	__u32 reason;
	__u32 ifindex;
	__u32 rule; /* number within its network, from 1; 0: none */
};

#endif
