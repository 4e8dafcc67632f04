"""The mathematics: schedules, denoisers, samplers, guidance, noise. It knows no network and no file."""
