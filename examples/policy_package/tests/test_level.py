from fnet_level import Level

from fnet_search.testing import PolicyConformance


class TestLevel(PolicyConformance):
    policy = Level
