/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * ARP (RFC 826, 5227) and neighbour discovery (RFC 4861): the switch knows all answers, so it gives them itself and
 * no guest ever hears what another one asks.
 */
#ifndef ANSWER_H
#define ANSWER_H

#include "parse.h"
#include "policy.h"

#define ARP_REQUEST 1
#define ND_ROUTER_SOLICITATION 133
#define ND_ROUTER_ADVERTISEMENT 134
#define ND_SOLICITATION 135
#define ND_ADVERTISEMENT 136
#define ND_REDIRECT 137
#define ND_ROUTER 0x80000000
#define ND_SOLICITED 0x40000000
#define ND_OVERRIDE 0x20000000
#define ND_OPTION_TARGET 2

struct arp {
	__be16 hardware, protocol;
	__u8 hardware_size, protocol_size;
	__be16 operation;
	__u8 sender[6], sender_ip[4], target[6], target_ip[4];
} __attribute__((packed));

struct advertisement {
	struct ethhdr eth;
	struct ipv6hdr ip;
	struct {
		__u8 type, code;
		__u16 checksum;
		__be32 flags;
		union address target;
		__u8 option, length, mac[6];
	} nd;
} __attribute__((packed));

static __always_inline __u16 fold(__s64 sum)
{
	sum = (sum & 0xffff) + ((sum >> 16) & 0xffffffff);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return ~sum;
}

static __always_inline int answered(struct frame *f)
{
	if (f->counters && !f->traced)
		f->counters->answered++;
	return tell(f, FATE_ANSWER, 0, f->skb->ifindex, bpf_redirect(f->skb->ifindex, 0));
}

/* Answer the ARP request `f`, whose sender has been looked at, and whose target is in f->to. */
static __always_inline int answer_arp(struct frame *f, struct place *place)
{
	struct __sk_buff *skb = f->skb;
	struct ethhdr *eth = (void *)(long)skb->data;
	struct arp *arp = (void *)(eth + 1);
	__u8 ip[4];

	if ((void *)(arp + 1) > (void *)(long)skb->data_end)
		return drop(f, DROP_MALFORMED);
	__builtin_memcpy(ip, arp->sender_ip, 4);
	__builtin_memcpy(arp->sender_ip, arp->target_ip, 4);
	__builtin_memcpy(arp->target_ip, ip, 4);
	__builtin_memcpy(arp->target, arp->sender, 6);
	__builtin_memcpy(arp->sender, place->mac, 6);
	arp->operation = bpf_htons(2);
	__builtin_memcpy(eth->h_dest, arp->target, 6);
	__builtin_memcpy(eth->h_source, place->mac, 6);
	return answered(f);
}

/* Answer the neighbour solicitation `f`, whose sender has been looked at, and whose target is in f->to. */
static __always_inline int answer_nd(struct frame *f, struct place *place)
{
	struct advertisement answer = {};
	__u32 flags = ND_SOLICITED | ND_OVERRIDE;
	__s64 sum;

	if (place->flags & HOST && f->network->flags & UPLINK)
		flags |= ND_ROUTER;
	__builtin_memcpy(answer.eth.h_dest, f->from_mac, 6);
	__builtin_memcpy(answer.eth.h_source, place->mac, 6);
	answer.eth.h_proto = bpf_htons(ETH_P_IPV6);
	answer.ip.version = 6;
	answer.ip.payload_len = bpf_htons(sizeof(answer.nd));
	answer.ip.nexthdr = IPPROTO_ICMPV6;
	answer.ip.hop_limit = 255;
	__builtin_memcpy(&answer.ip.saddr, &f->to.address, 16);
	__builtin_memcpy(&answer.ip.daddr, &f->from, 16);
	answer.nd.type = ND_ADVERTISEMENT;
	answer.nd.flags = bpf_htonl(flags);
	__builtin_memcpy(&answer.nd.target, &f->to.address, 16);
	answer.nd.option = ND_OPTION_TARGET;
	answer.nd.length = 1;
	__builtin_memcpy(answer.nd.mac, place->mac, 6);
	sum = bpf_csum_diff(NULL, 0, (void *)&answer.nd, sizeof(answer.nd),
			    bpf_htonl(sizeof(answer.nd)) + bpf_htonl(IPPROTO_ICMPV6));
	sum = bpf_csum_diff(NULL, 0, (void *)&f->to.address, 16, sum);
	sum = bpf_csum_diff(NULL, 0, (void *)&f->from, 16, sum);
	answer.nd.checksum = fold(sum);
	if (bpf_skb_change_tail(f->skb, sizeof(answer), 0) ||
	    bpf_skb_store_bytes(f->skb, 0, &answer, sizeof(answer), 0))
		return drop(f, DROP_MALFORMED);
	return answered(f);
}

/* Read an ARP packet; gives 0, or the reason to drop it plus one. */
static __always_inline int parse_arp(struct frame *f, __u16 *operation, __u8 *sender)
{
	struct __sk_buff *skb = f->skb;
	struct arp *arp;
	__u32 ip;

	if (!readable(skb, ETH_SIZE + sizeof(*arp)))
		return REFUSE(DROP_MALFORMED);
	arp = (void *)(long)skb->data + ETH_SIZE;
	if ((void *)(arp + 1) > (void *)(long)skb->data_end)
		return REFUSE(DROP_MALFORMED);
	if (arp->hardware != bpf_htons(1) || arp->protocol != bpf_htons(ETH_P_IP) || arp->hardware_size != 6 ||
	    arp->protocol_size != 4)
		return REFUSE(DROP_MALFORMED);
	*operation = bpf_ntohs(arp->operation);
	__builtin_memcpy(sender, arp->sender, 6);
	__builtin_memcpy(&ip, arp->sender_ip, 4);
	set_ipv4(&f->from, ip);
	__builtin_memcpy(&ip, arp->target_ip, 4);
	set_ipv4(&f->to.address, ip);
	f->family = 4;
	return 0;
}

/* Read the target of a neighbour solicitation into f->to; gives 0, or the reason to drop it plus one. */
static __always_inline int parse_solicitation(struct frame *f)
{
	__u8 option[8] = {};
	union address target;

	/* RFC 4861, section 7.1.1; RFC 6980 forbids fragments. */
	if (f->hops != 255 || f->fragmented)
		return REFUSE(DROP_ND);
	if (bpf_skb_load_bytes(f->skb, f->l4 + 8, &target, sizeof(target)) || target.byte[0] == 0xff)
		return REFUSE(DROP_ND);
	if (bpf_skb_load_bytes(f->skb, f->l4 + 24, option, sizeof(option)) == 0 && option[0] == 1 &&
	    (option[1] != 1 || !same_mac(option + 2, f->from_mac)))
		return REFUSE(DROP_ND);
	f->to.address = target;
	return 0;
}

#endif
