/* SPDX-License-Identifier: GPL-2.0-only */
/* IP headers, read with nothing taken on trust. Each function gives 0, or the reason to drop the frame plus one. */
#ifndef PARSE_H
#define PARSE_H

#include <linux/icmpv6.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>

#include "frame.h"

#define REFUSE(reason) ((reason) + 1)
#define MAX_EXTENSIONS 8

#define ICMP_REPLY 0
#define ICMP_REQUEST 8
#define ICMPV6_REQUEST 128
#define ICMPV6_REPLY 129

#define IPV4_MORE 0x2000
#define IPV4_OFFSET 0x1fff
#define IPV6_MORE 0x0001
#define IPV6_OFFSET 0xfff8

static __always_inline int parse_ipv4(struct frame *f)
{
	struct __sk_buff *skb = f->skb;
	struct iphdr *ip;
	__u32 header, total;
	__u16 fragment;

	if (!readable(skb, ETH_SIZE + sizeof(*ip)))
		return REFUSE(DROP_MALFORMED);
	ip = (void *)(long)skb->data + ETH_SIZE;
	if ((void *)(ip + 1) > (void *)(long)skb->data_end)
		return REFUSE(DROP_MALFORMED);
	header = ip->ihl * 4;
	total = bpf_ntohs(ip->tot_len);
	if (ip->version != 4 || header < sizeof(*ip) || total < header || total > skb->len - ETH_SIZE)
		return REFUSE(DROP_MALFORMED);
	set_ipv4(&f->from, ip->saddr);
	set_ipv4(&f->to.address, ip->daddr);
	fragment = bpf_ntohs(ip->frag_off);
	f->fragmented = fragment & (IPV4_MORE | IPV4_OFFSET);
	f->later = fragment & IPV4_OFFSET;
	f->fragment = ip->id;
	f->family = 4;
	f->protocol = ip->protocol;
	f->hops = ip->ttl;
	f->l4 = ETH_SIZE + header;
	return 0;
}

/* Follow the extension headers (RFC 8200, section 4) to what they carry. */
static __always_inline int skip_extensions(struct frame *f)
{
	struct {
		__u8 next, length;
		__be16 offset;
		__be32 id;
	} header;

	for (int i = 0; i < MAX_EXTENSIONS; i++) {
		switch (f->protocol) {
		case IPPROTO_HOPOPTS:
		case IPPROTO_ROUTING:
		case IPPROTO_DSTOPTS:
		case IPPROTO_AH:
		case IPPROTO_FRAGMENT:
			break;
		default:
			return 0;
		}
		if (bpf_skb_load_bytes(f->skb, f->l4, &header, sizeof(header)))
			return REFUSE(DROP_MALFORMED);
		if (f->protocol == IPPROTO_FRAGMENT) {
			__u16 offset = bpf_ntohs(header.offset);

			f->fragmented = true;
			f->later = offset & IPV6_OFFSET;
			f->fragment = header.id;
			f->l4 += 8;
		} else if (f->protocol == IPPROTO_AH) {
			f->l4 += (header.length + 2) * 4;
		} else {
			f->l4 += (header.length + 1) * 8;
		}
		f->protocol = header.next;
		if (f->later)
			return 0;
	}
	return REFUSE(DROP_MALFORMED);
}

static __always_inline int parse_ipv6(struct frame *f)
{
	struct __sk_buff *skb = f->skb;
	struct ipv6hdr *ip;
	__u32 length;

	if (!readable(skb, ETH_SIZE + sizeof(*ip)))
		return REFUSE(DROP_MALFORMED);
	ip = (void *)(long)skb->data + ETH_SIZE;
	if ((void *)(ip + 1) > (void *)(long)skb->data_end)
		return REFUSE(DROP_MALFORMED);
	length = bpf_ntohs(ip->payload_len);
	if (ip->version != 6 || length > skb->len - ETH_SIZE - sizeof(*ip))
		return REFUSE(DROP_MALFORMED);
	__builtin_memcpy(&f->from, &ip->saddr, 16);
	__builtin_memcpy(&f->to.address, &ip->daddr, 16);
	f->family = 6;
	f->protocol = ip->nexthdr;
	f->hops = ip->hop_limit;
	f->l4 = ETH_SIZE + sizeof(*ip);
	return skip_extensions(f);
}

/*
 * ICMP has no ports. An echo request gets its identifier as the sender's, and a reply as the receiver's, so that a reply
 * is what answers a request and a request never is.
 */
static __always_inline int parse_icmp(struct frame *f)
{
	struct {
		__u8 type, code;
		__u16 checksum, id;
	} header = {};

	if (bpf_skb_load_bytes(f->skb, f->l4, &header, sizeof(header)) &&
	    bpf_skb_load_bytes(f->skb, f->l4, &header, 1))
		return REFUSE(DROP_MALFORMED);
	f->icmp = header.type;
	f->from_port = f->to_port = bpf_htons(header.type);
	if (header.type == (f->family == 4 ? ICMP_REQUEST : ICMPV6_REQUEST)) {
		f->from_port = header.id;
	} else if (header.type == (f->family == 4 ? ICMP_REPLY : ICMPV6_REPLY)) {
		f->from_port = bpf_htons(f->family == 4 ? ICMP_REQUEST : ICMPV6_REQUEST);
		f->to_port = header.id;
	}
	return 0;
}

/* The type of an ICMP message, and the ports of what has some. */
static __always_inline int parse_transport(struct frame *f)
{
	__u16 ports[2];

	if (f->later)
		return 0;
	switch (f->protocol) {
	case IPPROTO_ICMP:
	case IPPROTO_ICMPV6:
		return parse_icmp(f);
	case IPPROTO_TCP:
	case IPPROTO_UDP:
	case IPPROTO_UDPLITE:
	case IPPROTO_SCTP:
	case IPPROTO_DCCP:
		if (bpf_skb_load_bytes(f->skb, f->l4, ports, sizeof(ports)))
			return REFUSE(DROP_MALFORMED);
		f->from_port = ports[0];
		f->to_port = ports[1];
	}
	return 0;
}

static __always_inline bool is_multicast(const struct frame *f)
{
	const union address *to = &f->to.address;

	if (f->family == 6)
		return to->byte[0] == 0xff;
	return (to->byte[12] & 0xf0) == 0xe0 || to->word[3] == 0xffffffff ||
	       (f->network->mask4 && to->word[3] == (f->network->net4 | ~f->network->mask4));
}

/* The destination lies in the network itself, so that no uplink leads to it. */
static __always_inline bool is_inside(const struct frame *f)
{
	const struct network *network = f->network;
	const union address *to = &f->to.address;

	if (f->family == 4)
		return network->mask4 && (to->word[3] & network->mask4) == network->net4;
	if (is_link_local(to))
		return true;
	return network->mask6.half[0] && (to->half[0] & network->mask6.half[0]) == network->net6.half[0] &&
	       (to->half[1] & network->mask6.half[1]) == network->net6.half[1];
}

#endif
