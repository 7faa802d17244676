from fnet_level import Level

from fnet_search.policy.conformance import PolicyConformance


class TestLevel(PolicyConformance):
    policy = Level
