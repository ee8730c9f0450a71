/* SPDX-License-Identifier: GPL-2.0-only */
/* Who may talk to whom: VLANs, isolation, rules with the state of what they have allowed, and rates. */
#ifndef POLICY_H
#define POLICY_H

#include "parse.h"

#define NANOSECONDS 1000000000ULL
#define TCP_SECONDS 7200
#define OTHER_SECONDS 180

static __always_inline bool is_in_vlan(const __u8 *mac, __u16 vlan)
{
	struct member member = { .vlan = vlan };

	__builtin_memcpy(member.mac, mac, 6);
	return bpf_map_lookup_elem(&trunks, &member) != NULL;
}

/* As for private VLANs (RFC 5517): an isolated NIC talks to those without a group, one in a group also to its group. */
static __always_inline bool may_talk(const struct frame *f, const struct place *place)
{
	bool from_bound = f->from_group || f->from_flags & ISOLATED;
	bool to_bound = place->group || place->flags & ISOLATED;

	if (place->flags & HOST || f->from_flags & HOST)
		return true;
	if (f->vlan != place->vlan && !(place->flags & TRUNK && is_in_vlan(place->mac, f->vlan)))
		return false;
	if (!from_bound || !to_bound)
		return true;
	return !((f->from_flags | place->flags) & ISOLATED) && f->from_group == place->group;
}

static __always_inline bool is_party(const struct party *party, const union address *address, const __u8 *mac,
				     __u32 group)
{
	switch (party->side) {
	case PREFIX:
		return (address->half[0] & party->mask.half[0]) == party->address.half[0] &&
		       (address->half[1] & party->mask.half[1]) == party->address.half[1];
	case NIC:
		return same_mac(party->mac, mac);
	case GROUP:
		return party->group == group;
	}
	return true;
}

struct search {
	struct frame *f;
	const __u8 *to_mac;
	__u32 to_group;
	__u32 first;
	__u32 found; /* number of the rule, from 1; 0: none */
	bool allow;
};

static long look_at_rule(__u32 number, void *context)
{
	struct search *search = context;
	struct frame *f = search->f;
	__u32 index = search->first + number;
	struct rule *rule = bpf_map_lookup_elem(&rules, &index);
	__u16 port = bpf_ntohs(f->to_port);

	if (!rule)
		return 1;
	if ((rule->family && rule->family != f->family) || (rule->protocol && rule->protocol != f->protocol) ||
	    port < rule->low || port > rule->high || !is_party(&rule->from, &f->from, f->from_mac, f->from_group) ||
	    !is_party(&rule->to, &f->to.address, search->to_mac, search->to_group))
		return 0;
	search->found = number + 1;
	search->allow = rule->allow;
	return 1;
}

static __always_inline bool is_icmp_error(const struct frame *f)
{
	if (f->protocol == IPPROTO_ICMP && f->family == 4)
		return f->icmp == 3 || f->icmp == 11 || f->icmp == 12;
	return f->protocol == IPPROTO_ICMPV6 && f->icmp >= 1 && f->icmp <= 4;
}

static __always_inline bool is_known(struct frame *f, const struct flow *flow, __u64 now)
{
	struct flow_state *state = bpf_map_lookup_elem(&flows, flow);
	__u64 lifetime = (f->protocol == IPPROTO_TCP ? TCP_SECONDS : OTHER_SECONDS) * NANOSECONDS;

	if (!state || state->generation != f->network->generation || now - state->last_seen > lifetime)
		return false;
	if (!f->traced)
		state->last_seen = now;
	return true;
}

/*
 * Whether the rules of the network let the frame pass: 0, or the reason to drop it plus one.
 *
 * The rules are asked for the first datagram of a flow; the following ones pass, and so do those that answer, as long
 * as the rules are the same. Errors of ICMP pass. Later fragments have no ports: they pass if their first one did.
 */
static __always_inline int ask_rules(struct frame *f, const __u8 *to_mac, __u32 to_group)
{
	struct flow flow = { .net = f->to.net, .protocol = f->protocol };
	struct search search = { .f = f, .to_mac = to_mac, .to_group = to_group, .first = f->network->first_rule };
	struct flow_state state = { .generation = f->network->generation };
	__u64 now = bpf_ktime_get_coarse_ns();
	int refused;

	if (!(f->network->flags & RULES))
		return 0;
	refused = parse_transport(f);
	if (refused)
		return refused;
	if (f->later) {
		flow.from = f->from;
		flow.to = f->to.address;
		flow.fragment = 1;
		flow.id = f->fragment;
		return is_known(f, &flow, now) ? 0 : REFUSE(DROP_FRAGMENT);
	}
	if (is_icmp_error(f))
		return 0;
	flow.from = f->to.address;
	flow.to = f->from;
	flow.from_port = f->to_port;
	flow.to_port = f->from_port;
	if (is_known(f, &flow, now))
		goto passes;
	flow.from = f->from;
	flow.to = f->to.address;
	flow.from_port = f->from_port;
	flow.to_port = f->to_port;
	if (is_known(f, &flow, now))
		goto passes;
	bpf_loop(f->network->rules, look_at_rule, &search, 0);
	f->rule = search.found;
	if (search.found && !search.allow)
		return REFUSE(DROP_RULE);
	if (f->traced)
		return 0;
	state.last_seen = now;
	bpf_map_update_elem(&flows, &flow, &state, BPF_ANY);
passes:
	if (f->fragmented && !f->traced) {
		flow.from = f->from;
		flow.to = f->to.address;
		flow.from_port = flow.to_port = 0;
		flow.fragment = 1;
		flow.id = f->fragment;
		state.last_seen = now;
		bpf_map_update_elem(&flows, &flow, &state, BPF_ANY);
	}
	return 0;
}

/* Take the frame's bytes out of a bucket, if there are as many. */
static __always_inline bool within_rate(struct frame *f, __u32 ifindex, __u32 direction)
{
	struct limited key = { ifindex, direction };
	struct bucket *bucket;
	__u64 now, waited;
	bool within;

	if (f->traced)
		return true;
	bucket = bpf_map_lookup_elem(&buckets, &key);
	if (!bucket)
		return true;
	now = bpf_ktime_get_ns();
	bpf_spin_lock(&bucket->lock);
	waited = now > bucket->filled ? now - bucket->filled : 0;
	if (waited > NANOSECONDS)
		waited = NANOSECONDS;
	bucket->tokens += waited * bucket->rate / NANOSECONDS;
	if (bucket->tokens > bucket->burst)
		bucket->tokens = bucket->burst;
	bucket->filled = now;
	within = bucket->tokens >= f->skb->len;
	if (within)
		bucket->tokens -= f->skb->len;
	bpf_spin_unlock(&bucket->lock);
	return within;
}

#endif
