// SPDX-License-Identifier: GPL-2.0-only
/*
 * The inter-VM IP switch of a host: datagrams are dispatched by their destination address.
 *
 * The program `dispatch` serves every link of the switch's own, and tells by the link what comes in:
 *
 *   from_guest     ingress of a guest's tap
 *   from_underlay  ingress of a network's VXLAN
 *   from_host      egress of a network's gateway link, which is how the host itself, and what it routes, comes in
 *
 * The program `uplink` sits at the ingress of physical NICs, and lets pass whatever is for no guest.
 *
 * The sender is looked at first (MAC, addresses, ARP and neighbour discovery), then who is on the list for the
 * destination, then whether the two may talk. A hit goes to the tap of the guest or, if it is on another host, to the
 * VXLAN; what is on no list leaves by an uplink. Whatever needs the host's own network stack (its addresses, ICMP
 * errors, fragmentation, routes between networks) is handed to it through the gateway link. Addresses are never
 * changed, nor are hop limits: for guests this is a link, not a router.
 */
#include "answer.h"
#include "frame.h"
#include "policy.h"

#define ETH_P_REVERSE_ARP 0x8035

static __always_inline bool set_macs(struct __sk_buff *skb, const __u8 *to, const __u8 *from)
{
	struct ethhdr *eth = (void *)(long)skb->data;

	if ((void *)(eth + 1) > (void *)(long)skb->data_end)
		return false;
	__builtin_memcpy(eth->h_dest, to, 6);
	if (from)
		__builtin_memcpy(eth->h_source, from, 6);
	return true;
}

/* Give the frame the tag `vlan`, or none for 0. */
static __always_inline bool tag(struct frame *f, __u16 vlan)
{
	__u16 present = f->skb->vlan_present ? f->skb->vlan_tci & VLAN_MASK : 0;

	if (present == vlan && !!f->skb->vlan_present == !!vlan)
		return true;
	if (f->traced)
		return true;
	if (f->skb->vlan_present && bpf_skb_vlan_pop(f->skb))
		return false;
	return !vlan || bpf_skb_vlan_push(f->skb, bpf_htons(ETH_P_8021Q), vlan) == 0;
}

static __always_inline void mirror(struct frame *f, __u32 ifindex)
{
	if (ifindex && !f->traced)
		bpf_clone_redirect(f->skb, ifindex, 0);
}

/* Hand the frame to the host's network stack. */
static __always_inline int to_host(struct frame *f)
{
	if (!tag(f, 0) || !set_macs(f->skb, f->network->gateway, NULL))
		return drop(f, DROP_MALFORMED);
	count_received(f, f->network->slot, f->network->gateway);
	return tell(f, FATE_HOST, 0, f->to.net, bpf_redirect(f->to.net, BPF_F_INGRESS));
}

static __always_inline int to_guest(struct frame *f, struct place *place, const __u8 *from_mac)
{
	__u32 ifindex = place->ifindex;

	if (place->flags & LIMITED && !within_rate(f, ifindex, TO_GUEST))
		return drop(f, DROP_RATE);
	if (!tag(f, place->vlan == f->vlan ? 0 : f->vlan) || !set_macs(f->skb, place->mac, from_mac))
		return drop(f, DROP_MALFORMED);
	count_received(f, place->slot, place->mac);
	mirror(f, place->mirror);
	return tell(f, FATE_GUEST, 0, ifindex, bpf_redirect(ifindex, 0));
}

static __always_inline int to_underlay(struct frame *f, struct place *place, const __u8 *from_mac)
{
	if (!tag(f, f->vlan) || !set_macs(f->skb, place->mac, from_mac))
		return drop(f, DROP_MALFORMED);
	count_received(f, 0, place->mac);
	return tell(f, FATE_UNDERLAY, 0, place->ifindex, bpf_redirect(place->ifindex, 0));
}

/* Let the frame out, where the host's routes lead. */
static __always_inline int leave(struct frame *f)
{
	struct bpf_fib_lookup route = { .ifindex = f->to.net, .l4_protocol = f->protocol };
	struct attachment *link;
	__u32 ifindex;
	long found;

	if (f->hops <= 1)
		return to_host(f);
	if (f->family == 4) {
		route.family = 2;
		route.ipv4_src = f->from.word[3];
		route.ipv4_dst = f->to.address.word[3];
	} else {
		route.family = 10;
		__builtin_memcpy(route.ipv6_src, &f->from, 16);
		__builtin_memcpy(route.ipv6_dst, &f->to.address, 16);
	}
	route.tot_len = f->skb->gso_size ? 0 : f->skb->len - ETH_SIZE;
	found = bpf_fib_lookup(f->skb, &route, sizeof(route), 0);
	if (found != BPF_FIB_LKUP_RET_SUCCESS && found != BPF_FIB_LKUP_RET_NO_NEIGH)
		return to_host(f);
	ifindex = route.ifindex;
	link = bpf_map_lookup_elem(&links, &ifindex);
	if (!link || link->kind != PHYSICAL)
		return to_host(f);
	if (f->skb->gso_size) {
		__u32 mtu = 0;

		/* 0 and not the length: the size of the segments is compared */
		if (bpf_check_mtu(f->skb, ifindex, &mtu, 0, BPF_MTU_CHK_SEGS))
			return to_host(f);
	}
	if (!tag(f, 0))
		return drop(f, DROP_MALFORMED);
	count_received(f, 0, f->network->gateway);
	if (found == BPF_FIB_LKUP_RET_SUCCESS) {
		if (!set_macs(f->skb, route.dmac, route.smac))
			return drop(f, DROP_MALFORMED);
		return tell(f, FATE_UPLINK, 0, ifindex, bpf_redirect(ifindex, 0));
	}
	return tell(f, FATE_UPLINK, 0, ifindex, bpf_redirect_neigh(ifindex, NULL, 0, 0));
}

static __always_inline int to_uplink(struct frame *f)
{
	int refused;

	if (!(f->network->flags & UPLINK) || is_inside(f))
		return drop(f, DROP_NO_DESTINATION);
	refused = ask_rules(f, f->network->gateway, 0);
	return refused ? drop(f, refused - 1) : leave(f);
}

struct flood {
	struct frame *f;
	bool tagged; /* those who get it with a tag; else those who get it without */
};

static long flood_port(__attribute__((unused)) void *map, __u32 *ifindex, struct nic *nic, struct flood *flood)
{
	struct frame *f = flood->f;
	struct place place = { .flags = nic->flags, .group = nic->group, .vlan = nic->vlan };
	bool tagged = nic->vlan != f->vlan;

	if (nic->net != f->to.net || *ifindex == f->skb->ifindex || tagged != flood->tagged)
		return 0;
	__builtin_memcpy(place.mac, nic->mac, 6);
	if (may_talk(f, &place))
		bpf_clone_redirect(f->skb, *ifindex, 0);
	return 0;
}

/* Multicast and broadcast: to nobody, or to everybody who may hear the sender. */
static __always_inline int to_everybody(struct frame *f, bool underlay)
{
	struct flood flood = { .f = f };

	if (!(f->network->flags & FLOOD))
		return drop(f, DROP_MULTICAST);
	if (f->traced)
		return tell(f, FATE_FLOOD, 0, 0, TC_ACT_SHOT);
	if (!tag(f, 0))
		return drop(f, DROP_MALFORMED);
	bpf_for_each_map_elem(&ports, flood_port, &flood, 0);
	if (!tag(f, f->vlan))
		return drop(f, DROP_MALFORMED);
	flood.tagged = true;
	if (f->vlan)
		bpf_for_each_map_elem(&ports, flood_port, &flood, 0);
	if (!underlay || !f->network->vxlan)
		return TC_ACT_SHOT;
	return bpf_redirect(f->network->vxlan, 0);
}

/* A NIC has arrived on this host: from now on its addresses lead to its tap. */
static __always_inline void settle(const struct nic *nic, const union address *address, __u32 ifindex, bool routed)
{
	struct where where = { .net = nic->net, .address = *address };
	struct place *before = bpf_map_lookup_elem(&list, &where);
	struct place place = {
		.net = nic->net,
		.ifindex = ifindex,
		.flags = nic->flags | LOCAL,
		.group = nic->group,
		.mirror = nic->mirror,
		.slot = nic->slot,
		.vlan = nic->vlan,
	};

	if (before && (before->ifindex == ifindex || !same_mac(before->mac, nic->mac)))
		return;
	__builtin_memcpy(place.mac, nic->mac, 6);
	bpf_map_update_elem(&list, &where, &place, BPF_ANY);
	where.net = 0;
	if (routed)
		bpf_map_update_elem(&list, &where, &place, BPF_ANY);
}

/* A NIC has left this host: its addresses lead to the VXLAN, which knows by now where it is. */
static __always_inline void release(__u32 net, __u32 vxlan, const union address *address)
{
	struct where where = { .net = net, .address = *address };
	struct place *before = bpf_map_lookup_elem(&list, &where);
	struct place place;

	if (!before || !(before->flags & LOCAL))
		return;
	place = *before;
	place.ifindex = vxlan;
	place.flags = (before->flags & ~(LOCAL | LIMITED)) | REMOTE;
	place.mirror = place.slot = 0;
	bpf_map_update_elem(&list, &where, &place, BPF_EXIST);
	where.net = 0;
	if (bpf_map_lookup_elem(&list, &where))
		bpf_map_update_elem(&list, &where, &place, BPF_EXIST);
}

/*
 * QEMU announces a guest that has migrated by a reverse ARP request (RFC 903) from its new place, of which only the
 * source matters. The lists follow at once; the control plane says the same a moment later.
 */
static __always_inline int announce_here(struct frame *f, const struct nic *nic)
{
	bool routed = f->network->flags & UPLINK;
	union address ip4;

	if (!f->traced) {
		set_ipv4(&ip4, nic->ip4);
		if (nic->ip4)
			settle(nic, &ip4, f->skb->ifindex, routed);
		if (!is_unspecified(&nic->ip6))
			settle(nic, &nic->ip6, f->skb->ifindex, routed);
		settle(nic, &nic->link_local, f->skb->ifindex, false);
	}
	if (!f->network->vxlan)
		return tell(f, FATE_NONE, 0, 0, TC_ACT_SHOT);
	return tell(f, FATE_UNDERLAY, 0, f->network->vxlan, bpf_redirect(f->network->vxlan, 0));
}

static __always_inline int announce_there(struct frame *f)
{
	struct owner owner = { .net = f->to.net };
	struct addresses *addresses;
	union address ip4;

	__builtin_memcpy(owner.mac, f->from_mac, 6);
	addresses = bpf_map_lookup_elem(&known, &owner);
	if (!addresses)
		return drop(f, DROP_UNDERLAY);
	if (!f->traced) {
		set_ipv4(&ip4, addresses->ip4);
		release(owner.net, f->skb->ifindex, &ip4);
		release(owner.net, f->skb->ifindex, &addresses->ip6);
		release(owner.net, f->skb->ifindex, &addresses->link_local);
	}
	return tell(f, FATE_NONE, 0, 0, TC_ACT_SHOT);
}

/* Drop a frame between two who may not talk to each other. */
static __always_inline int drop_apart(struct frame *f, const struct place *place)
{
	return drop(f, f->vlan == place->vlan || place->flags & TRUNK ? DROP_ISOLATED : DROP_VLAN);
}

/* To whom the list says, if the two may talk. */
static __always_inline int to_place(struct frame *f, struct place *place, const __u8 *from_mac)
{
	int refused;

	if (!may_talk(f, place))
		return drop_apart(f, place);
	refused = ask_rules(f, place->mac, place->group);
	if (refused)
		return drop(f, refused - 1);
	if (place->flags & LOCAL)
		return to_guest(f, place, from_mac);
	if (place->flags & HOST)
		return to_host(f);
	return to_underlay(f, place, from_mac);
}

static __always_inline bool begin(struct frame *f, __u16 *protocol)
{
	struct __sk_buff *skb = f->skb;
	struct ethhdr *eth;

	f->traced = skb->mark == TRACE_MARK;
	f->now = bpf_ktime_get_coarse_ns();
	if (!readable(skb, ETH_SIZE))
		return false;
	eth = (void *)(long)skb->data;
	if ((void *)(eth + 1) > (void *)(long)skb->data_end)
		return false;
	__builtin_memcpy(f->from_mac, eth->h_source, 6);
	*protocol = bpf_ntohs(eth->h_proto);
	return true;
}

static __always_inline bool to_group_mac(struct __sk_buff *skb)
{
	__u8 *first = (void *)(long)skb->data;

	return (void *)(first + 1) <= (void *)(long)skb->data_end && *first & 1;
}

static __always_inline int arp_of_guest(struct frame *f, struct nic *nic)
{
	__u8 sender[6];
	__u16 operation;
	struct place *place;
	int refused = parse_arp(f, &operation, sender);

	if (refused)
		return drop(f, refused - 1);
	/* A probe (RFC 5227, section 2.1.1) has no sender address. */
	if (!same_mac(sender, nic->mac) || (f->from.word[3] && f->from.word[3] != nic->ip4))
		return drop(f, DROP_ARP);
	if (operation != ARP_REQUEST)
		return drop(f, DROP_ARP);
	count_sent(f);
	if (f->to.address.word[3] == nic->ip4)
		return tell(f, FATE_NONE, 0, 0, TC_ACT_SHOT); /* it asks whether its address is taken: nobody says so */
	place = bpf_map_lookup_elem(&list, &f->to);
	if (!place)
		return drop(f, DROP_NO_DESTINATION);
	return may_talk(f, place) ? answer_arp(f, place) : drop_apart(f, place);
}

/* Neighbour discovery of a guest: what it asks is answered, and it may tell nobody anything. */
static __always_inline int nd_of_guest(struct frame *f, struct nic *nic)
{
	struct place *place;
	int refused;

	switch (f->icmp) {
	case ND_ROUTER_ADVERTISEMENT:
	case ND_REDIRECT:
		return drop(f, DROP_ROUTER);
	case ND_ADVERTISEMENT:
		return drop(f, DROP_ND);
	}
	refused = parse_solicitation(f);
	if (refused)
		return drop(f, refused - 1);
	count_sent(f);
	if (is_unspecified(&f->from)) {
		/* It asks whether the address that it wants is taken (RFC 4862, section 5.4): its own is not. */
		if (same_address(&f->to.address, &nic->ip6) || same_address(&f->to.address, &nic->link_local))
			return tell(f, FATE_NONE, 0, 0, TC_ACT_SHOT);
		return drop(f, DROP_ND);
	}
	place = bpf_map_lookup_elem(&list, &f->to);
	if (!place)
		return drop(f, DROP_NO_DESTINATION);
	return may_talk(f, place) ? answer_nd(f, place) : drop_apart(f, place);
}

static __always_inline bool is_nd(const struct frame *f)
{
	return f->family == 6 && f->protocol == IPPROTO_ICMPV6 && f->icmp > ND_ROUTER_SOLICITATION &&
	       f->icmp <= ND_REDIRECT;
}

/* Whether the sender may use the address that it gives: 0, or the reason to drop the frame plus one. */
static __always_inline int check_source(struct frame *f, struct nic *nic)
{
	if (f->family == 4)
		return nic->ip4 && f->from.word[3] == nic->ip4 ? 0 : REFUSE(DROP_SOURCE_IPV4);
	if (same_address(&f->from, &nic->link_local))
		return 0;
	if (is_unspecified(&f->from)) /* address detection and reports before there is an address */
		return f->to.address.byte[0] == 0xff ? 0 : REFUSE(DROP_SOURCE_IPV6);
	if (same_address(&f->from, &nic->ip6))
		return 0;
	return is_link_local(&f->from) ? REFUSE(DROP_LINK_LOCAL) : REFUSE(DROP_SOURCE_IPV6);
}

static __noinline int from_guest(struct __sk_buff *skb, struct nic *nic)
{
	struct frame frame = { .skb = skb }, *f = &frame;
	__u32 ifindex = skb->ifindex;
	struct place *place;
	__u16 protocol;
	int refused;

	if (!nic || !begin(f, &protocol))
		return TC_ACT_SHOT;
	f->counters = counters_at(nic->slot);
	f->network = bpf_map_lookup_elem(&networks, &nic->net);
	if (!f->network)
		return drop(f, DROP_NO_PORT);
	if (!same_mac(f->from_mac, nic->mac))
		return drop(f, DROP_SOURCE_MAC);
	f->to.net = nic->net;
	f->from_flags = nic->flags;
	f->from_group = nic->group;
	f->vlan = nic->vlan;
	if (skb->vlan_present) {
		f->vlan = skb->vlan_tci & VLAN_MASK;
		if (!(nic->flags & TRUNK) || skb->vlan_proto != bpf_htons(ETH_P_8021Q) || !is_in_vlan(nic->mac, f->vlan))
			return drop(f, DROP_VLAN);
	}
	if (nic->flags & LIMITED && !within_rate(f, ifindex, FROM_GUEST))
		return drop(f, DROP_RATE);
	if (!skb->gso_size && skb->len > f->network->mtu + ETH_SIZE)
		return drop(f, DROP_TOO_BIG);

	switch (protocol) {
	case ETH_P_IP:
		refused = parse_ipv4(f);
		break;
	case ETH_P_IPV6:
		refused = parse_ipv6(f);
		break;
	case ETH_P_ARP:
		return arp_of_guest(f, nic);
	case ETH_P_REVERSE_ARP:
		return announce_here(f, nic);
	case ETH_P_8021Q:
	case ETH_P_8021AD:
		return drop(f, DROP_VLAN);
	default:
		return drop(f, DROP_ETHERTYPE);
	}
	if (!refused)
		refused = check_source(f, nic);
	if (!refused && f->family == 6 && f->protocol == IPPROTO_ICMPV6)
		refused = parse_transport(f);
	if (refused)
		return drop(f, refused - 1);
	if (is_nd(f))
		return nd_of_guest(f, nic);
	count_sent(f);
	mirror(f, nic->mirror);
	if (is_multicast(f) || to_group_mac(skb))
		return to_everybody(f, true);
	place = bpf_map_lookup_elem(&list, &f->to);
	return place ? to_place(f, place, NULL) : to_uplink(f);
}

/* What a bridge on another host asks for a guest of this one. */
static __always_inline int question_of_underlay(struct frame *f)
{
	struct place *place = bpf_map_lookup_elem(&list, &f->to);

	if (!place || !(place->flags & LOCAL))
		return drop(f, DROP_MULTICAST);
	return f->family == 4 ? answer_arp(f, place) : answer_nd(f, place);
}

static __noinline int from_underlay(struct __sk_buff *skb, __u32 net, __u32 slot)
{
	struct frame frame = { .skb = skb }, *f = &frame;
	struct place *place;
	struct where from = {};
	__u16 protocol, operation;
	__u8 sender[6];
	int refused;

	if (!begin(f, &protocol))
		return TC_ACT_SHOT;
	f->counters = counters_at(slot);
	f->network = bpf_map_lookup_elem(&networks, &net);
	if (!f->network)
		return drop(f, DROP_NO_PORT);
	f->to.net = from.net = net;
	f->vlan = skb->vlan_present ? skb->vlan_tci & VLAN_MASK : 0;
	switch (protocol) {
	case ETH_P_IP:
		refused = parse_ipv4(f);
		break;
	case ETH_P_IPV6:
		refused = parse_ipv6(f);
		if (!refused && f->protocol == IPPROTO_ICMPV6)
			refused = parse_transport(f);
		break;
	case ETH_P_ARP:
		refused = parse_arp(f, &operation, sender);
		if (!refused && (operation != ARP_REQUEST || !same_mac(sender, f->from_mac)))
			refused = REFUSE(DROP_ARP);
		break;
	case ETH_P_REVERSE_ARP:
		return announce_there(f);
	default:
		return drop(f, DROP_ETHERTYPE);
	}
	if (refused)
		return drop(f, refused - 1);
	from.address = f->from;
	place = bpf_map_lookup_elem(&list, &from);
	if (place ? !same_mac(place->mac, f->from_mac) : !same_mac(f->network->gateway, f->from_mac))
		return drop(f, DROP_UNDERLAY);
	f->from_flags = place ? place->flags : HOST;
	f->from_group = place ? place->group : 0;
	count_sent(f);
	if (protocol == ETH_P_ARP)
		return question_of_underlay(f);
	if (is_nd(f)) {
		if (f->icmp != ND_SOLICITATION)
			return drop(f, DROP_ND);
		refused = parse_solicitation(f);
		return refused ? drop(f, refused - 1) : question_of_underlay(f);
	}
	if (is_multicast(f) || to_group_mac(skb))
		return to_everybody(f, false);
	place = bpf_map_lookup_elem(&list, &f->to);
	if (!place || !(place->flags & LOCAL))
		return drop(f, DROP_NO_DESTINATION);
	return to_place(f, place, NULL);
}

static __noinline int from_host(struct __sk_buff *skb, __u32 slot)
{
	struct frame frame = { .skb = skb, .from_flags = HOST }, *f = &frame;
	struct place *place;
	__u16 protocol;
	int refused;

	if (!begin(f, &protocol))
		return TC_ACT_SHOT;
	f->to.net = skb->ifindex;
	f->counters = counters_at(slot);
	f->network = bpf_map_lookup_elem(&networks, &f->to.net);
	if (!f->network)
		return drop(f, DROP_NO_PORT);
	if (protocol == ETH_P_IP)
		refused = parse_ipv4(f);
	else if (protocol == ETH_P_IPV6)
		refused = parse_ipv6(f);
	else
		return drop(f, DROP_ETHERTYPE);
	if (refused)
		return drop(f, refused - 1);
	__builtin_memcpy(f->from_mac, f->network->gateway, 6);
	count_sent(f);
	if (is_multicast(f))
		return to_everybody(f, false);
	place = bpf_map_lookup_elem(&list, &f->to);
	if (!place || place->flags & HOST)
		return drop(f, DROP_NO_DESTINATION);
	f->vlan = place->vlan;
	return to_place(f, place, f->network->gateway);
}

SEC("tc")
int uplink(struct __sk_buff *skb)
{
	struct frame frame = { .skb = skb, .from_flags = HOST }, *f = &frame;
	struct place *place;
	__u16 protocol;

	if (skb->pkt_type != 0 || skb->vlan_present || !begin(f, &protocol)) /* 0: to this host */
		return TC_ACT_UNSPEC;
	if (protocol == ETH_P_IP ? parse_ipv4(f) : protocol == ETH_P_IPV6 ? parse_ipv6(f) : 1)
		return TC_ACT_UNSPEC;
	place = bpf_map_lookup_elem(&list, &f->to);
	if (!place || place->flags & HOST)
		return tell(f, FATE_PASS, 0, 0, TC_ACT_UNSPEC);
	f->to.net = place->net;
	f->network = bpf_map_lookup_elem(&networks, &f->to.net);
	if (!f->network)
		return TC_ACT_UNSPEC;
	/* Larger than the guests' link carries: the host says so to the sender. */
	if (!skb->gso_size && skb->len > f->network->mtu + ETH_SIZE)
		return tell(f, FATE_PASS, 0, 0, TC_ACT_UNSPEC);
	f->counters = counters_at(f->network->slot);
	__builtin_memcpy(f->from_mac, f->network->gateway, 6);
	f->vlan = place->vlan;
	return to_place(f, place, f->network->gateway);
}

SEC("tc")
int dispatch(struct __sk_buff *skb)
{
	__u32 ifindex = skb->ifindex;
	struct nic *nic = bpf_map_lookup_elem(&ports, &ifindex);
	struct attachment *link;

	if (nic)
		return from_guest(skb, nic);
	link = bpf_map_lookup_elem(&links, &ifindex);
	if (!link)
		return TC_ACT_SHOT; /* a tap that is not in the tables yet, or no longer */
	if (link->kind == VXLAN)
		return from_underlay(skb, link->net, link->slot);
	return from_host(skb, link->slot);
}

char LICENSE[] SEC("license") = "GPL";
