"""Policies: validation of what an administrator applies."""

import json
from typing import Any

import pytest

from sandbox_broker.contract.policies import InvalidPolicies, Policy, parse_policies

FULL: dict[str, Any] = {
    "name": "adventure",
    "match": {"track_name": "lab-adventure"},
    "lease_hours": 8,
    "max_extension_hours": 1.5,
    "standby_hours": 24,
    "max_active": 100,
    "wait_minutes": 30,
    "max_replacements": 1,
    "access": {"groups": ["user", "act_admin"]},
    "stock": {
        "name_prefix": "lab-adventure-",
        "min": 20,
        "max": 60,
        "admin_user": {"email": "a@example.com", "name": "Ann"},
    },
}


def problems(*raw: Any) -> dict[str, str]:
    with pytest.raises(InvalidPolicies) as caught:
        parse_policies(list(raw))
    return {problem["field"]: problem["problem"] for problem in caught.value.problems}


def test_a_document_is_returned_as_it_was_written() -> None:
    policies = parse_policies([FULL, {"name": "b"}])
    assert json.dumps([policy.to_document() for policy in policies]) == json.dumps([FULL, {"name": "b"}])
    assert [Policy.model_validate(policy.to_document()) for policy in policies] == list(policies)


def test_no_policies_are_valid() -> None:
    assert parse_policies([]) == ()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"name": ""}, "name"),
        ({"name": "ä"}, "name"),
        ({"name": 7}, "name"),
        ({"lease_hours": 0}, "lease_hours"),
        ({"lease_hours": "8"}, "lease_hours"),
        ({"lease_hours": True}, "lease_hours"),
        ({"lease_hours": float("nan")}, "lease_hours"),
        ({"lease_hours": 1e9}, "lease_hours"),
        ({"standby_hours": 0}, "standby_hours"),
        ({"max_extension_hours": -1}, "max_extension_hours"),
        ({"max_active": -1}, "max_active"),
        ({"max_active": 1.5}, "max_active"),
        ({"wait_minutes": -1}, "wait_minutes"),
        ({"max_replacements": None, "max_replacement": 1}, "max_replacement"),
        ({"match": {}}, "match"),
        ({"match": "lab"}, "match"),
        ({"match": {"track_name": "a", "name_prefix": "b"}}, "match"),
        ({"match": {"track_names": "a"}}, "match"),
        ({"match": {"track_name": ""}}, "match.track_name"),
        ({"access": {"groups": []}}, "access.groups"),
        ({"access": {}}, "access.groups"),
        ({"stock": {"name_prefix": "lab-", "min": 3, "max": 2}}, "stock"),
        ({"stock": {"name_prefix": "lab-1", "min": 1, "max": 2}}, "stock"),
        ({"stock": {"name_prefix": "lab-", "min": 1}}, "stock.max"),
        ({"stock": {**FULL["stock"], "admin_user": {"email": "a", "name": "A"}}}, "stock.admin_user.email"),
        ({"stock": {**FULL["stock"], "owner": "A"}}, "stock.owner"),
    ],
    ids=str,
)
def test_a_wrong_value_is_named(change: dict[str, Any], field: str) -> None:
    found = problems({"name": "good"}, {**FULL, **change})
    assert f"policies.1.{field}" in found
    assert all(found.values())


@pytest.mark.parametrize("raw", [None, {}, 7, "a", [7], [None], [["name", "a"]]], ids=repr)
def test_policies_are_a_list_of_objects(raw: Any) -> None:
    with pytest.raises(InvalidPolicies):
        parse_policies(raw)


def test_all_problems_are_reported_together() -> None:
    assert set(problems({"name": "a", "lease_hours": -1, "mood": 1}, {"max_active": "many"})) == {
        "policies.0.lease_hours",
        "policies.0.mood",
        "policies.1.name",
        "policies.1.max_active",
    }


def test_policies_that_exclude_each_other_are_refused() -> None:
    match, stock = {"track_name": "lab"}, {"name_prefix": "lab-", "min": 0, "max": 1}
    assert set(
        problems(
            {"name": "a", "match": match},
            {"name": "b", "match": match},
            {"name": "a", "match": {"name_prefix": "lab"}},
            {"name": "c", "stock": stock},
            {"name": "d", "stock": stock},
            {"name": "e"},
            {"name": "f", "lease_hours": 1},
        )
    ) == {"policies.1.match", "policies.2.name", "policies.4.stock.name_prefix", "policies.6.match"}


def test_stock_rules_need_no_match() -> None:
    rules = [{"name": name, "stock": {"name_prefix": f"{name}-", "min": 0, "max": 1}} for name in ("a", "b")]
    assert [policy.is_stock_only for policy in parse_policies([*rules, {"name": "c"}])] == [True, True, False]
