"""What a person is shown of a router."""

from expertly.watch.report import readings, spread


def test_readings_say_the_number_and_what_is_healthy():
    watched = {
        "dead_frac": 0.25,
        "entropy_norm": 0.9634,
        "effective_experts": 14.44,
        "max_load_ratio": 2.2,
        "dropped_frac": 0.013,
    }
    said = {reading.name: (reading.now, reading.healthy) for reading in readings(watched)}
    assert said["experts without a token"] == ("25%", "near 0%")
    assert said["load entropy"] == ("0.963", "above 0.8")
    assert said["hottest expert"] == ("2.20x its share", "below 4x")
    assert said["dropped tokens"] == ("1.3%", "near 0%")


def test_what_is_not_known_is_left_out():
    assert readings({}) == []
    assert [each.name for each in readings({"dead_frac": 0.0, "entropy_norm": None})] == [
        "experts without a token"
    ]


def test_an_even_load_is_half_height_and_a_dead_expert_is_the_lowest():
    assert spread([0.25] * 4) == "▅▅▅▅"
    assert spread([0.5, 0.5, 0.0, 0.0]) == "██▁▁"
    assert spread([1.0, 0.0]) == "█▁"
