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

/* What the rules are asked, as plain data: the verifier then looks at them once, and not for each who asks. */
struct question {
	union address from, to;
	__u8 from_mac[6], to_mac[6];
	__u32 net, from_group, to_group;
	__u32 first_rule, rules, generation;
	__u32 id;    /* of a fragment's datagram */
	__u32 found; /* number of the rule that decided, from 1; 0: none */
	__u16 from_port, to_port;
	__u8 family, protocol, icmp;
	bool fragmented, later, traced, allow;
};

static long look_at_rule(__u32 number, void *context)
{
	struct question *asked = *(struct question **)context;
	__u32 index = asked->first_rule + number;
	struct rule *rule = bpf_map_lookup_elem(&rules, &index);
	__u16 port = bpf_ntohs(asked->to_port);

	if (!rule)
		return 1;
	if ((rule->family && rule->family != asked->family) || (rule->protocol && rule->protocol != asked->protocol) ||
	    port < rule->low || port > rule->high ||
	    !is_party(&rule->from, &asked->from, asked->from_mac, asked->from_group) ||
	    !is_party(&rule->to, &asked->to, asked->to_mac, asked->to_group))
		return 0;
	asked->found = number + 1;
	asked->allow = rule->allow;
	return 1;
}

static __always_inline bool is_icmp_error(const struct question *asked)
{
	if (asked->protocol == IPPROTO_ICMP && asked->family == 4)
		return asked->icmp == 3 || asked->icmp == 11 || asked->icmp == 12;
	return asked->protocol == IPPROTO_ICMPV6 && asked->icmp >= 1 && asked->icmp <= 4;
}

static __always_inline bool is_known(const struct question *asked, const struct flow *flow, __u64 now)
{
	struct flow_state *state = bpf_map_lookup_elem(&flows, flow);
	__u64 lifetime = (asked->protocol == IPPROTO_TCP ? TCP_SECONDS : OTHER_SECONDS) * NANOSECONDS;

	if (!state || state->generation != asked->generation || now - state->last_seen > lifetime)
		return false;
	if (!asked->traced)
		state->last_seen = now;
	return true;
}

/* What ask_rules() says where there are rules. */
__noinline int rules_say(struct question *asked)
{
	struct flow_state state = {};
	struct flow flow = {};
	__u64 now;

	if (!asked)
		return REFUSE(DROP_RULE);
	now = bpf_ktime_get_coarse_ns();
	state.generation = asked->generation;
	flow.net = asked->net;
	flow.protocol = asked->protocol;
	if (asked->later) {
		flow.from = asked->from;
		flow.to = asked->to;
		flow.fragment = 1;
		flow.id = asked->id;
		return is_known(asked, &flow, now) ? 0 : REFUSE(DROP_FRAGMENT);
	}
	if (is_icmp_error(asked))
		return 0;
	flow.from = asked->to;
	flow.to = asked->from;
	flow.from_port = asked->to_port;
	flow.to_port = asked->from_port;
	if (is_known(asked, &flow, now))
		goto passes;
	flow.from = asked->from;
	flow.to = asked->to;
	flow.from_port = asked->from_port;
	flow.to_port = asked->to_port;
	if (is_known(asked, &flow, now))
		goto passes;
	bpf_loop(asked->rules, look_at_rule, &asked, 0); /* its context must lie on the stack */
	if (asked->found && !asked->allow)
		return REFUSE(DROP_RULE);
	if (asked->traced)
		return 0;
	state.last_seen = now;
	bpf_map_update_elem(&flows, &flow, &state, BPF_ANY);
passes:
	if (asked->fragmented && !asked->traced) {
		flow.from = asked->from;
		flow.to = asked->to;
		flow.from_port = flow.to_port = 0;
		flow.fragment = 1;
		flow.id = asked->id;
		state.last_seen = now;
		bpf_map_update_elem(&flows, &flow, &state, BPF_ANY);
	}
	return 0;
}

/*
 * Whether the rules of the network let the frame pass: 0, or the reason to drop it plus one.
 *
 * The rules are asked for the first datagram of a flow; the following ones pass, and so do those that answer, as long
 * as the rules are the same. Errors of ICMP pass. Later fragments have no ports: they pass if their first one did.
 */
static __always_inline int ask_rules(struct frame *f, const __u8 *to_mac, __u32 to_group)
{
	struct network *network = f->network;
	struct question asked = {};
	int refused;

	if (!(network->flags & RULES))
		return 0;
	refused = parse_transport(f);
	if (refused)
		return refused;
	asked.from = f->from;
	asked.to = f->to.address;
	__builtin_memcpy(asked.from_mac, f->from_mac, 6);
	__builtin_memcpy(asked.to_mac, to_mac, 6);
	asked.net = f->to.net;
	asked.from_group = f->from_group;
	asked.to_group = to_group;
	asked.first_rule = network->first_rule;
	asked.rules = network->rules;
	asked.generation = network->generation;
	asked.id = f->fragment;
	asked.from_port = f->from_port;
	asked.to_port = f->to_port;
	asked.family = f->family;
	asked.protocol = f->protocol;
	asked.icmp = f->icmp;
	asked.fragmented = f->fragmented;
	asked.later = f->later;
	asked.traced = f->traced;
	refused = rules_say(&asked);
	f->rule = asked.found;
	return refused;
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
