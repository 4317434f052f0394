"""The arrows of the house: which module may import which, no cycles, and the size of the core."""

import house


def test_flat_files_import_no_room_and_rooms_not_one_another():
    allowed = {
        ("sweep", "evaluate"),
        ("loss_mask", "data_prep"),  # stage 02 builds stage 01 if it is missing
        ("export", "evaluate"),  # what is exported is what is evaluated
        ("sources", "standin"),
        ("ifeval", "evaluate"),
        ("audit", "loss_mask"),
    }
    for module, imported in house.graph().items():
        package, *own = module.split(".")
        for other in imported:
            target, *place = other.split(".")
            if package == "atlas_lib":
                assert target == "atlas_lib", f"{module} imports the tool {other}"
                arrow = (own[0], place[0]) if own and place else None
                if arrow and place[0] in house.ROOMS and own[0] != place[0]:
                    assert arrow in allowed, f"{module} imports {other}"


def test_no_import_cycle():
    assert house.cycle(house.graph()) == []


def test_the_core_stays_small():
    assert house.lines(house.files("atlas_lib", "*.py")) <= 1_740
    assert house.layers(house.graph()) <= 6
