from reaper.main import main

main()
