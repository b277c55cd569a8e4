from hypothesis import settings

settings.register_profile("algorithm", deadline=None, derandomize=True)
settings.load_profile("algorithm")
